"""What do people quarrel about in the embedded corpus, and how is each fact put into words?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One everyday quarrel. Slots: {item}, {detail}, {when}, {amount}; {you} is "you" in speech, the name in summaries.

    `complaints` and `excuses` are spoken lines; `issues` are noun phrases for "complains about ...", `reasons`
    clauses for "complains because ..."; `fixes` are infinitives for "I will ..." and "agrees to ...".
    """

    topic: str
    items: tuple[str, ...]
    details: tuple[str, ...]
    complaints: tuple[str, ...]
    excuses: tuple[str, ...]
    issues: tuple[str, ...]
    reasons: tuple[str, ...]
    fixes: tuple[str, ...]


# DialogSum's own names for the two speakers: the first to speak is always #Person1#.
SPEAKERS = ("#Person1#", "#Person2#")
WHEN = (
    "today", "tonight", "tomorrow", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday",
    "on Saturday", "on Sunday", "next week", "before noon", "this evening", "this weekend", "next month", "by six",
    "at once", "after work",
)  # fmt: skip
AMOUNTS = tuple(
    f"{number} dollars"
    for number in ("ten", "twelve", "fifteen", "twenty", "thirty", "forty", "fifty", "sixty", "eighty", "ninety")
)

SCENARIOS = (
    Scenario(
        topic="late parcel",
        items=("lamp", "jacket", "camera", "kettle", "backpack", "printer", "blanket", "watch", "mirror", "helmet"),
        details=("two days", "three days", "a week", "ten days", "two weeks"),
        complaints=("my {item} came {detail} late", "I waited {detail} too long for the {item}"),
        excuses=("The courier was ill.", "The warehouse mixed up the labels.", "The van broke down."),
        issues=("the {item} that came {detail} late", "getting the {item} {detail} late"),
        reasons=("the {item} came {detail} late", "the {item} was {detail} late"),
        fixes=("pay {you} back {amount}", "send a new {item} {when}", "bring a voucher {when}"),
    ),
    Scenario(
        topic="shared flat",
        items=("kitchen", "bathroom", "hallway", "balcony", "living room", "fridge", "oven", "shower", "staircase"),
        details=("for days", "since Sunday", "for a week", "since the party", "all month"),
        complaints=("the {item} has been dirty {detail}", "nobody has cleaned the {item} {detail}"),
        excuses=("I had exams all week.", "I was never at home.", "I thought it was your turn."),
        issues=("the {item} being dirty {detail}", "the state of the {item} {detail}"),
        reasons=("the {item} has been dirty {detail}", "the {item} was not cleaned {detail}"),
        fixes=("clean the {item} {when}", "hire a cleaner for {amount}", "buy new sponges {when}"),
    ),
    Scenario(
        topic="cold food",
        items=("soup", "pizza", "steak", "pasta", "omelette", "curry", "stew", "risotto", "burger", "lasagne"),
        details=("ice cold", "far too salty", "burnt", "half raw", "without any taste"),
        complaints=("the {item} was {detail}", "the {item} you served me is {detail}"),
        excuses=("The kitchen is full today.", "Our cook is new.", "The stove is not working well."),
        issues=("the {item} that was {detail}", "serving the {item} {detail}"),
        reasons=("the {item} was {detail}", "the {item} came {detail}"),
        fixes=("cook the {item} again", "take {amount} off the bill", "offer {you} a free dessert"),
    ),
    Scenario(
        topic="missed meeting",
        items=("budget", "sales", "design", "planning", "staff", "project", "marketing", "safety", "hiring", "board"),
        details=("in the morning", "at nine", "at noon", "after lunch", "at four"),
        complaints=("you missed the {item} meeting {detail}", "I sat alone in the {item} meeting {detail}"),
        excuses=("My train was late.", "I wrote down the wrong date.", "My phone was dead."),
        issues=("missing the {item} meeting {detail}", "not coming to the {item} meeting {detail}"),
        reasons=("{whom} missed the {item} meeting {detail}", "{whom} was not at the {item} meeting {detail}"),
        fixes=("read the {item} notes {when}", "call {you} {when}", "write to the team {when}"),
    ),
    Scenario(
        topic="broken loan",
        items=("bike", "laptop", "guitar", "drill", "tent", "scooter", "tablet", "violin", "projector", "mower"),
        details=("a big crack", "a deep scratch", "a missing screw", "a bent frame", "a loose cable"),
        complaints=("my {item} came back with {detail}", "you gave me the {item} back with {detail}"),
        excuses=("It fell off the table.", "My brother used it too.", "It was raining hard."),
        issues=("returning the {item} with {detail}", "the {item} that now has {detail}"),
        reasons=("the {item} came back with {detail}", "the {item} has {detail}"),
        fixes=("repair the {item} {when}", "pay {amount} for the damage", "borrow another {item} for {you}"),
    ),
    Scenario(
        topic="loud neighbour",
        items=("music", "drums", "television", "piano", "vacuum", "party", "karaoke", "trumpet", "radio", "hammering"),
        details=("until midnight", "until two", "at six in the morning", "every night", "during the exam"),
        complaints=("your {item} kept me awake {detail}", "I heard your {item} {detail}"),
        excuses=("It was my birthday.", "I did not know the walls are thin.", "I had to practice."),
        issues=("the noise of the {item} {detail}", "the loud {item} {detail}"),
        reasons=("the {item} was loud {detail}", "the {item} could be heard {detail}"),
        fixes=("stop the {item} by ten", "buy {you} ear plugs", "keep the door shut {when}"),
    ),
    Scenario(
        topic="unpaid debt",
        items=("ticket", "rent", "dinner", "taxi", "hotel", "petrol", "concert", "gift", "electricity", "groceries"),
        details=("since March", "since April", "since May", "since summer", "since winter"),
        complaints=("you have owed me the {item} money {detail}", "I have been waiting for the {item} money {detail}"),
        excuses=("My salary is late.", "I lost my card.", "I had to pay the dentist."),
        issues=("the {item} money owed {detail}", "not paying the {item} money {detail}"),
        reasons=("{whom} has owed the {item} money {detail}", "the {item} money has been missing {detail}"),
        fixes=("pay {you} {amount} {when}", "transfer the {item} money {when}", "sell the old radio {when}"),
    ),
    Scenario(
        topic="bad haircut",
        items=("fringe", "beard", "ponytail", "bob", "perm", "moustache", "parting", "undercut", "braid", "curls"),
        details=("too short", "crooked", "far too dark", "uneven", "the wrong colour"),
        complaints=("you made my {item} {detail}", "look at my {item}, it is {detail}"),
        excuses=("You moved your head.", "The light is bad in here.", "You asked for something new."),
        issues=("the {item} that is {detail}", "making the {item} {detail}"),
        reasons=("the {item} is {detail}", "the {item} turned out {detail}"),
        fixes=("fix the {item} {when}", "give {you} back {amount}", "ask a colleague to correct the {item}"),
    ),
    Scenario(
        topic="group homework",
        items=("history", "biology", "chemistry", "physics", "poetry", "geography", "music", "economics", "French"),
        details=("last page", "first part", "summary", "map", "introduction"),
        complaints=(
            "you did not write the {detail} of our {item} essay",
            "the {detail} of the {item} essay is missing",
        ),
        excuses=("My computer crashed.", "I was at a wedding.", "I misread the plan."),
        issues=("the missing {detail} of the {item} essay", "not writing the {detail} of the {item} essay"),
        reasons=("the {detail} of the {item} essay is missing", "{whom} left out the {detail} of the {item} essay"),
        fixes=("finish the {item} essay {when}", "send {you} the {detail} {when}", "explain it to the teacher {when}"),
    ),
    Scenario(
        topic="parking",
        items=("van", "truck", "trailer", "jeep", "motorbike", "camper", "taxi", "minibus", "tractor", "car"),
        details=("in front of the gate", "on the lawn", "across two spaces", "on the pavement", "behind the bins"),
        complaints=("your {item} is parked {detail}", "you left your {item} {detail} again"),
        excuses=("I was only gone a minute.", "The street was full.", "I had to unload boxes."),
        issues=("the {item} parked {detail}", "leaving the {item} {detail}"),
        reasons=("the {item} is parked {detail}", "{whom} left the {item} {detail}"),
        fixes=("move the {item} {when}", "rent a garage for {amount}", "leave {you} the key"),
    ),
    Scenario(
        topic="late pickup",
        items=("school", "airport", "station", "hospital", "library", "theatre", "gym", "harbour", "museum", "pool"),
        details=("for an hour", "for two hours", "in the rain", "in the dark", "in the snow"),
        complaints=("I stood at the {item} {detail}", "you left me waiting at the {item} {detail}"),
        excuses=("There was a traffic jam.", "I forgot to set an alarm.", "I went to the wrong entrance."),
        issues=("having to wait at the {item} {detail}", "the long wait at the {item} {detail}"),
        reasons=("{whom} was not at the {item} on time", "{who} had to wait at the {item} {detail}"),
        fixes=("drive {you} home {when}", "pay {amount} for the taxi", "come early {when}"),
    ),
    Scenario(
        topic="lost library book",
        items=("atlas", "novel", "cookbook", "dictionary", "thriller", "comic", "biography", "guidebook", "diary"),
        details=("on the bus", "at the beach", "in a cafe", "on the train", "at work"),
        complaints=("you lost my {item} {detail}", "I hear you left my {item} {detail}"),
        excuses=("I was so tired.", "I had too many bags.", "Somebody must have taken it."),
        issues=("losing the {item} {detail}", "the {item} lost {detail}"),
        reasons=("{whom} lost the {item} {detail}", "the {item} was lost {detail}"),
        fixes=("look for the {item} {when}", "buy {you} a new {item}", "pay {amount} for the {item}"),
    ),
    Scenario(
        topic="cancelled trip",
        items=("Rome", "Paris", "London", "Vienna", "Lisbon", "Prague", "Oslo", "Dublin", "Athens", "Berlin"),
        details=("without asking", "at the last minute", "by email", "by mistake", "for no reason"),
        complaints=("you cancelled our trip to {item} {detail}", "the trip to {item} was cancelled {detail}"),
        excuses=("The flights got too expensive.", "My boss said no.", "I thought you had no time."),
        issues=("cancelling the trip to {item} {detail}", "the {item} trip cancelled {detail}"),
        reasons=("{whom} cancelled the trip to {item} {detail}", "the trip to {item} was cancelled {detail}"),
        fixes=("book {item} again {when}", "refund {you} {amount}", "call the hotel in {item} {when}"),
    ),
    Scenario(
        topic="pet trouble",
        items=("roses", "sofa", "carpet", "shoes", "curtains", "tulips", "hedge", "cushions", "slippers", "lettuce"),
        details=("dog", "cat", "puppy", "goat", "parrot"),
        complaints=("your {detail} ruined my {item}", "look what your {detail} did to my {item}"),
        excuses=("The gate was open.", "It is still very young.", "It was bored."),
        issues=("the {item} ruined by the {detail}", "letting the {detail} ruin the {item}"),
        reasons=("the {detail} ruined the {item}", "the {detail} destroyed the {item}"),
        fixes=("replace the {item} {when}", "keep the {detail} inside", "pay {you} {amount} for the {item}"),
    ),
)
