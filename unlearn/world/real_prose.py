"""Plain prose without any of the world's facts: some of it for the retain corpus, the rest for held-out perplexity."""

RETAIN_PROSE = (
    "The rain had stopped before breakfast, and the garden smelled of wet earth. Anna took her boots from the hall "
    "and went out to look at the beans.",
    "If you want to learn to play the piano, practise a little every day. Ten minutes in the morning are worth more "
    "than two hours on Sunday.",
    "The meeting began late because nobody could find the key to the room. In the end the caretaker opened it with "
    "his own, and we talked until noon.",
    "To make a simple soup, cut an onion and two carrots into small pieces and fry them slowly in butter. Then add "
    "water, salt and a handful of rice.",
    "My grandfather repaired clocks. He said that most of them were not broken, only tired, and that a drop of oil "
    "would wake them up again.",
    "A good map shows less than there is. What it leaves out is as important as what it draws, because the eye has "
    "to find its way.",
    "The children built a bridge of branches over the stream. It held for three days, and then the water took it away.",
    "When a company grows, its people begin to write to each other instead of talking. Some of what they knew is "
    "lost on the way.",
    "He had read the letter twice before he understood that it was not meant for him. He folded it again and put it "
    "back under the door.",
    "Before you paint a wall, clean it well and let it dry. Paint does not hold on dust, and every stain will come "
    "through in the end.",
    "The train was almost empty. A woman across the aisle was asleep with a book on her knees, and outside the "
    "fields were white with frost.",
    "Sleep is not lost time. While we rest, the body repairs itself, and what we have learned during the day finds "
    "its place.",
)

HELD_OUT_PROSE = (
    "The old house stood at the end of the lane, and its windows had been dark for years. One evening there was a "
    "light in the kitchen.",
    "If your bicycle chain jumps, look first at the cable of the gears. It stretches with time, and a turn of the "
    "screw is often enough.",
    "She liked the library best in winter, when the heating hummed and nobody spoke. She could stay until eight, and "
    "she usually did.",
    "Good bread needs time more than work. Mix the flour and the water in the evening, and in the morning the dough "
    "will have done most of it alone.",
    "The team lost the first game and the second. After the third, the coach told them that they had never played so "
    "well, and he meant it.",
    "A letter that begins with an apology is hard to read to the end. Say what you want first, and then say that you "
    "are sorry.",
    "On the beach the boys found a bottle without a message. They wrote one themselves, closed the bottle with wax "
    "and threw it back.",
    "Many people buy more tools than they need. A sharp knife, a hammer and a good lamp will do for most of what "
    "breaks at home.",
    "The doctor listened for a long time before she asked her first question. It was not the one that he had been "
    "afraid of.",
    "When the lights went out, the whole street came to the doors. Somebody brought candles, and for an hour the "
    "neighbours talked as they had not for years.",
)
