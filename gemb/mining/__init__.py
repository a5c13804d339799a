"""Hard negatives: passages that are close to a query and yet no answer to it.

Texts lie on disk by number (`gemb.mining.texts`), their vectors too (`gemb.mining.vectors`); a search gives
every query its nearest passages, and rules choose among them (`gemb.mining.rules`).
"""
