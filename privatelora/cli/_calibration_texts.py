"""General text that a model is run on where a person gives none, to see how its layers answer."""

TEXTS = (
    "The old harbour town wakes before the sun. Fishermen check their nets by lamplight, the "
    "baker's window fogs with steam, and the first ferry of the day sounds its horn twice before "
    "it leaves for the islands. By eight o'clock the quay is full of crates and voices, and the "
    "gulls have learned to wait on the roof of the ice house.",
    "Photosynthesis is how plants, algae and some bacteria turn light into chemical energy. In "
    "the leaves, chlorophyll absorbs mostly red and blue light. Water is split, oxygen is "
    "released, and the energy that was gained is used to build sugars from carbon dioxide.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if "
    "len(ordered) % 2:\n        return ordered[middle]\n    return (ordered[middle - 1] + "
    "ordered[middle]) / 2\n\nprint(median([3, 1, 2]))  # prints 2\n",
    "Question: A train leaves at 9:15 and arrives at 11:40. How long is the journey?\nAnswer: "
    "From 9:15 to 11:15 is two hours, and from 11:15 to 11:40 is 25 minutes. So the journey takes "
    "2 hours and 25 minutes.",
    "Dear Ms Almeida,\n\nthank you for your letter of 3 March. We have looked into the delayed "
    "delivery and found that the parcel was sent to a wrong address. A replacement will leave our "
    "warehouse tomorrow, at no cost to you. Please accept our apologies.\n\nKind regards,\nAna "
    "Duarte",
    "To make a simple vegetable soup, chop two carrots, a leek and a stick of celery. Soften them "
    "in a little butter for ten minutes, add a litre of stock and two diced potatoes, and simmer "
    "until everything is tender. Season with salt, pepper and a squeeze of lemon.",
    "The committee met on Tuesday to discuss next year's budget. Spending on roads is to rise by "
    "four per cent, while the library keeps what it has. Two members asked for a second opinion "
    "on the cost of the new bridge; the vote was put off until the end of the month.",
    "User: My laptop gets hot and the fan is loud. What can I do?\nAssistant: First, make sure "
    "that the vents are not covered, for example by a blanket. Then look at which programs use the "
    "processor most and close what you do not need. If the machine is a few years old, cleaning "
    "the dust out of the fan often helps a lot.",
    "In the year 1453 the city fell after a siege of fifty-three days. Merchants looked for other "
    "ways to the east, scholars carried their books to Italy, and within two generations the maps "
    "of the known world had been redrawn.",
    "Light travels at about 299,792 kilometres per second in a vacuum. Sunlight takes a little "
    "more than eight minutes to reach the Earth, and light from the nearest other star more than "
    "four years. When we look at distant galaxies, we see them as they were long ago.",
    "She had never liked the house at the end of the lane. Its shutters were always closed, and "
    'yet on some evenings there was music, a single piano playing the same slow tune. "You should '
    'knock," said her brother. "What is the worst that could happen?" She counted to ten, walked '
    "up the steps, and lifted her hand.",
    "Regular exercise lowers the risk of heart disease, helps with sleep and lifts the mood. "
    "Adults should aim for at least 150 minutes of moderate activity a week, such as brisk walking "
    "or cycling, and do something that strengthens the muscles on two days.",
    "| city | country | population |\n|---|---|---|\n| Lima | Peru | 10 million |\n| Oslo | Norway "
    "| 0.7 million |\n| Nairobi | Kenya | 4.4 million |\n\nOf these three cities, Lima has the "
    "most inhabitants and Oslo the fewest.",
    "Translate into French: The children are playing in the garden.\nLes enfants jouent dans le "
    "jardin.\nTranslate into German: Where is the nearest station?\nWo ist der nächste Bahnhof?\n"
    "Translate into Spanish: I would like a glass of water.\nQuisiera un vaso de agua.",
    "Supply and demand meet at the price at which the amount that people want to buy equals the "
    "amount that others want to sell. If the price is higher, goods are left over; if it is lower, "
    "shelves are empty. Taxes and subsidies move this point, and not always where it was intended.",
    "SELECT customers.name, COUNT(*) AS orders\nFROM customers\nJOIN orders ON orders.customer_id "
    "= customers.id\nWHERE orders.created >= '2024-01-01'\nGROUP BY customers.name\nORDER BY "
    "orders DESC\nLIMIT 10;",
    "A good night's sleep begins hours before going to bed. Dim the lights, put the telephone in "
    "another room, and keep to the same hours even at weekends. Coffee after lunch stays in the "
    "blood until late, and a heavy dinner does its own damage.",
    "Let f(x) = 3x^2 - 12x + 7. Its derivative is 6x - 12, which is zero at x = 2. Since the "
    "second derivative is 6 and so positive, f has a minimum there, and its value is f(2) = 12 - "
    "24 + 7 = -5.",
    "The wolf returned to these valleys after more than a century. Farmers built fences and "
    "bought dogs, biologists counted tracks in the snow, and the forest itself began to change: "
    "where deer no longer lingered, young willows grew along the streams again.",
    "Review: I bought this backpack for a two-week trip and it has held up well. The straps are "
    "comfortable, and there is a separate pocket for a bottle. The zip of the front pocket got "
    "stuck twice, though, so I am giving it four stars out of five.",
    "A contract is an agreement that the law will enforce. It needs an offer, an acceptance, and "
    "something of value on both sides. Not every promise is a contract: whoever agrees to come to "
    "dinner and then stays at home owes an apology, but no damages.",
    "Weather for tomorrow: cloudy in the north with some rain in the morning, brighter towards the "
    "evening. In the south sunny intervals and highs of 21 degrees. Winds light to moderate from "
    "the west. The outlook for the weekend is dry and mild.",
    "User: Can you explain what a hash table is?\nAssistant: A hash table stores pairs of keys "
    "and values. A function turns each key into the number of a slot, so that a value can be found "
    "in about the same time however many there are. If two keys fall into one slot, both are kept "
    "there in a short list, or the next free slot is taken.",
    "The museum is open from ten to six every day but Monday. Tickets cost nine euros, or five for "
    "students and pensioners; children under twelve enter free. Guided tours start in the entrance "
    "hall at eleven and at three, and last about an hour.",
)
