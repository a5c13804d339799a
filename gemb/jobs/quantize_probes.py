"""Texts that an export and its source both embed: what they make of them tells what the export lost.

Short and long ones, single tokens, many scripts, code, numbers, and near neighbours that only a small change
tells apart; all written for gemb. A long one repeats sentences of the others, so that it fills a window.
"""

_QUESTIONS = (
    "how do I undo the last commit in git",
    "how can I take back my most recent git commit",
    "how do I push the last commit in git",
    "what is the boiling point of water at high altitude",
    "at which temperature does water boil on a mountain",
    "which bread keeps longest without a freezer",
    "who wrote the first computer program",
    "is a tomato a fruit or a vegetable",
    "cheap flights from Lisbon to Oslo in March",
    "cheap flights from Oslo to Lisbon in March",
    "side effects of taking too much vitamin D",
    "my train was late, can I get my money back",
    "rules for refunds when a train is delayed",
    "python list of files sorted by size",
    "why is the sky blue",
    "why is the sky dark at night",
)
_PASSAGES = (
    "git reset --soft HEAD~1 takes the last commit back and keeps its changes; with --hard they are gone.",
    "Air pressure falls with height, so water boils at about 93 degrees at 2,000 metres above the sea.",
    "Sunlight is scattered by the molecules of the air, and short waves far more than long ones.",
    "If there were stars in every direction and no end of time, the night would be as bright as the day.",
    "Passengers whose train arrives an hour late or more are paid back a quarter of the fare on request.",
    "Botanists call a tomato a berry; cooks and customs officers have called it a vegetable since 1893.",
    "The harbour was empty when we came, but for two boats that nobody had moved since the autumn storms.",
    "An index keeps for every word the pages where it stands, so that nobody has to read the whole book.",
    "She counted the eggs twice, wrote thirteen on the lid, and put the box behind the flour.",
    "Concrete hardens by a reaction with water and not by drying, which is why it sets under the sea.",
    "A contract that was signed under threat can be contested within one year after the threat has ended.",
    "The patient should fast for eight hours before the blood sample is taken; water is allowed.",
    "Quarterly revenue rose by 4.2 % to 1.38 billion, while costs of energy fell for the third time.",
    "To change a tyre, loosen the nuts before lifting the car, and tighten them crosswise after lowering it.",
    "Bees find the way back by the position of the sun, even when clouds leave only a patch of blue.",
    "The committee met on 3 May, heard two experts, and put off the decision until the figures are known.",
)
_SCRIPTS = (
    "Die Bibliothek ist samstags von zehn bis vierzehn Uhr geöffnet.",
    "La bibliothèque est ouverte le samedi de dix heures à quatorze heures.",
    "La biblioteca abre los sábados de diez a dos de la tarde.",
    "Biblioteka jest otwarta w soboty od dziesiątej do czternastej.",
    "Kütüphane cumartesi günleri saat ondan ikiye kadar açıktır.",
    "Thư viện mở cửa vào thứ Bảy từ mười giờ đến hai giờ chiều.",
    "Библиотека открыта по субботам с десяти до четырнадцати часов.",
    "Η βιβλιοθήκη είναι ανοιχτή τα Σάββατα από τις δέκα έως τις δύο.",
    "المكتبة مفتوحة أيام السبت من العاشرة حتى الثانية بعد الظهر.",
    "הספרייה פתוחה בשבת מעשר עד שתיים.",
    "पुस्तकालय शनिवार को दस बजे से दो बजे तक खुला रहता है।",
    "গ্রন্থাগার শনিবার দশটা থেকে দুটো পর্যন্ত খোলা থাকে।",
    "நூலகம் சனிக்கிழமைகளில் பத்து மணி முதல் இரண்டு மணி வரை திறந்திருக்கும்.",
    "ห้องสมุดเปิดวันเสาร์ตั้งแต่สิบโมงถึงบ่ายสองโมง",
    "图书馆星期六上午十点到下午两点开放。",
    "図書館は土曜日の十時から十四時まで開いています。",
    "도서관은 토요일 열 시부터 두 시까지 엽니다.",
    "ბიბლიოთეკა შაბათობით ათიდან ორ საათამდე ღიაა.",
    "Գրադարանը շաբաթ օրերին բաց է տասից երկուսը։",
    "ቤተ መጻሕፍቱ ቅዳሜ ከአራት እስከ ስምንት ሰዓት ክፍት ነው።",
)
_CODE = (
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)",
    "def median(values: list[float]) -> float:\n    return sorted(values)[len(values) // 2]",
    "SELECT city, COUNT(*) FROM orders WHERE year = 2024 GROUP BY city ORDER BY 2 DESC LIMIT 10;",
    'for file in *.log; do gzip -9 "$file" && echo "$file packed"; done',
    "const total = items.filter(item => item.paid).reduce((sum, item) => sum + item.price, 0);",
    '#include <stdio.h>\nint main(void) { puts("hello"); return 0; }',
    '{"name": "sensor-7", "unit": "kPa", "values": [101.3, 101.1, null, 100.9]}',
    "fn largest(values: &[i64]) -> Option<i64> { values.iter().copied().max() }",
    '<nav><a href="/about">About us</a><a href="/contact">Contact</a></nav>',
    "pip install --no-deps 'package[extra]==1.2.3' --index-url https://example.org/simple",
)
_SHORT = (
    "a",
    "water",
    "42",
    "?",
    "é",
    "水",
    "Paris",
    "no",
    "not bad",
    "bad",
    "😀",
    "2024-05-03",
    "1e-5",
    "HTTP 404",
)
_LISTS = (
    "Titanium; 22; Ti; 47.867; 1,668 °C; 4.506 g/cm³",
    "iron 26 Fe 55.845 1538 7.874",
    "To: all staff. Subject: fire drill on Thursday at 11. Leave by the stairs; do not use the lifts.",
    "From 12 to 15 degrees, light wind from the west, showers in the evening, snow above 1,800 metres.",
    "2 cups of flour, 1 egg, a pinch of salt, half a litre of milk; fry thin in butter, two minutes a side",
    "room 214 is booked Tue 14:00 to 15:30; room 215 is free all day",
)
_ALL = (*_PASSAGES, *_LISTS, *_CODE)

PROBES: tuple[str, ...] = (
    *_QUESTIONS,
    *_PASSAGES,
    *_SCRIPTS,
    *_CODE,
    *_SHORT,
    *_LISTS,
    "\n\n".join(_PASSAGES[:4]),
    "\n\n".join(_ALL),
    " ".join(_SCRIPTS),
    "again and again " * 40,
)
"""Each is told apart by a model that works; the order is part of nothing."""
