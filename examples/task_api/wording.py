"""The words of the running example: one wording for training, another for the test.

The two share nothing that is copied or phrased: title words, names, dates and sentences are apart (a test proves it). What they share
is the closed vocabulary that the task's rules are about: weekdays, "tomorrow", "urgent", "no rush" and the like.
"""

from dataclasses import dataclass

WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
DAYS = ["today", "tomorrow", *WEEKDAYS, "next week", "next month", *(f"next {day}" for day in WEEKDAYS)]

HIGH = ["urgent", "high priority", "important", "critical", "top priority"]
LOW = ["low priority", "minor", "not urgent", "unimportant"]
MEDIUM = ["medium priority", "normal priority", "medium"]


def split(text: str) -> list[str]:
    """Phrases between bars; a bar may start a new line."""
    return [phrase.strip() for phrase in text.split("|")]


@dataclass(frozen=True)
class Titles:
    """Parts that make sensible titles together: verb + thing, and sometimes an end."""

    verbs: list[str]
    things: list[str]
    ends: list[str]


@dataclass(frozen=True)
class Wording:
    """One split's surface. {title}, {ref} and the like are slots (see generate.py); {tail} is where optional clauses may follow."""

    titles: list[Titles]
    names: list[str]
    month_days: list[str]
    """How a day of the year is written; {n} is a number from `numbers`."""
    numbers: range
    ids: range
    ref_id: list[str]
    """How a task is named by its number; {id} is the number."""
    ref_title: list[str]
    create: list[str]
    complete: list[str]
    list_: dict[str, list[str]]
    """Status -> sentences."""
    update: list[str]
    delete: list[str]
    due: list[str]
    high: list[str]
    low: list[str]
    person: list[str]
    list_filters: list[str]


TRAIN = Wording(
    titles=[
        Titles(
            split("write|review|print|sign|send|translate|archive|proofread|finish|update|hand in|scan|go over"),
            split(
                """quarterly report|the blog post|cover letter|rental contract|tax return|meeting minutes|the user manual
                |price list|expense form|job advert|budget sheet|safety checklist|vendor quotes|staff survey|guest list
                |the press release|lease extension|travel policy"""
            ),
            split("to accounting|with legal|from the supplier|about the refund|in two languages"),
        ),
        Titles(
            split("buy|order|repair|clean|replace|pick up|wash|measure|return|sell|paint|look for|pack"),
            split(
                """the kitchen tap|printer paper|winter jackets|the garden fence|light bulbs|bike chain|water filter|new laptop
                |camera lens|roof rack|tent poles|the broken chair|coffee beans|school uniform|chess set|cat food
                |the north window|two spare keys|a blue sofa"""
            ),
            split("in the cellar|at the station|on the second floor|from grandma|in the office"),
        ),
        Titles(
            split("book|plan|prepare|schedule|cancel|confirm|set up|move|announce"),
            split(
                """dentist visit|team lunch|the summer trip|piano lesson|flu shot|birthday dinner|the budget round|job interview
                |parents evening|the beta test|a chess evening|yearly health check|kickoff call|the fire drill|garage sale
                |weekend in Rome|choir practice"""
            ),
            split("with the landlord|at the bank|on the roof terrace|near the airport|with both teams"),
        ),
        Titles(
            split("fix|deploy|test|debug|upgrade|look into|back up|restart|rewrite|document|profile|sort out"),
            split(
                """the login page|server logs|payment gateway|backup job|the pull request|the search index|mobile app|mail server
                |the nightly build|image cache|user database|the old firewall|price import|rate limiter|the signup form
                |error alerts"""
            ),
            split("on the website|in staging|after the outage|on node three"),
        ),
    ],
    names=split(
        """Priya|Tom|Elena|Marcus|Yuki|Fatima|Oscar|Ingrid|Pablo|Chloe|Dmitri|Aisha|Liam|Hanna|Rafael|Nina|Kofi|Sofia|Viktor|Leila
        |Bruno|Emma|Jamal|Greta|Hugo|Mina|Anton|Rosa|Felix|Zara|Diego|Alma|Peter|Wei|Laura|Samir|Julia|Nils"""
    ),
    month_days=[
        "march {n}",
        "june {n}",
        "october {n}",
        "january {n}",
        "august {n}",
        "december {n}",
        "2027-03-{n}",
        "2026-11-{n}",
        "2028-06-{n}",
    ],
    numbers=range(10, 20),
    ids=range(2, 500),
    ref_id=["#{id}", "task {id}", "task #{id}", "number {id}", "no. {id}", "item {id}"],
    ref_title=["{title}", '"{title}"', "{title}", "the task {title}", "'{title}'", 'the "{title}" task', "my task to {title}"],
    create=[
        "Add a task to {title}{tail}",
        "add {title}{tail}",
        "Remind me to {title}{tail}",
        "remind me to {title}{tail} please",
        "I need to {title}{tail}",
        "New task: {title}{tail}",
        "todo: {title}{tail}",
        "Please create a task: {title}{tail}",
        "Can you add {title} to my list{tail}?",
        "create a todo to {title}{tail}",
        'Create "{title}"{tail}',
        "put {title} on the list{tail}",
        "We have to {title}{tail}",
        "don't let me forget to {title}{tail}",
        "I should {title}{tail}",
        "Could you create a task to {title}{tail}?",
        "{title}{tail}, add that",
        "note: {title}{tail}",
        "I want to {title}{tail}",
        "make a new task called {title}{tail}",
        "Let's {title}{tail}",
        "someone must {title}{tail}",
        "Add an item: {title}{tail}",
        "Add {high} task: {title}{tail}",
        "this is {high}: {title}{tail}",
        "New {low} task: {title}{tail}",
        "{low} todo: {title}{tail}",
        "{high}! {title}{tail}",
        "By {due} I need to {title}{tail}",
        "on {due} remind me to {title}{tail}",
        "Task for {due}: {title}{tail}",
        "{person} has to {title}{tail}",
        "Ask {person} to {title}{tail}",
        "new task for {person}: {title}{tail}",
        "have {person} {title}{tail}",
        "{person} should {title} by {due}{tail}",
    ],
    complete=[
        "Mark {ref} as done",
        "mark {ref} as complete",
        "I finished {ref}",
        "{ref} is done",
        "Complete {ref}",
        "done with {ref}",
        "Please complete {ref}",
        "I'm done with {ref}, thanks",
        "{ref} is finished",
        "tick off {ref}",
        "Check off {ref} please",
        "we completed {ref} today",
        "set {ref} to done",
        "you can mark {ref} done",
        "I just did {ref}",
        "{ref}: done",
        "finished {ref} at last",
    ],
    list_={
        "open": [
            "Show my tasks{tail}",
            "list tasks{tail}",
            "What do I have to do{tail}?",
            "what's open{tail}",
            "Show me the list{tail}",
            "List all open tasks{tail}",
            "which tasks are left{tail}?",
            "what is on my list{tail}?",
            "Show the todos{tail} please",
            "what should I work on{tail}",
            "give me the open tasks{tail}",
            "Show {high} tasks{tail}",
            "list everything {high}{tail}",
            "which {low} tasks are there{tail}?",
            "List {low} todos{tail}",
            "What does {person} have to do{tail}?",
            "show {person}'s tasks{tail}",
            "what's due {due}{tail}?",
            "List tasks due {due}{tail}",
        ],
        "done": [
            "Show completed tasks{tail}",
            "what did we finish{tail}?",
            "List done tasks{tail}",
            "which tasks are done{tail}?",
            "show me everything that is finished{tail}",
            "what has {person} completed{tail}?",
            "list all finished todos{tail}",
        ],
        "all": [
            "Show all tasks, open and done{tail}",
            "list every task, finished or not{tail}",
            "Show both open and done tasks{tail}",
            "everything on the list, also what is done{tail}",
        ],
    },
    update=[
        "Make {ref} {high}",
        "Set {ref} to {high}",
        "{ref} is {high} now",
        "change {ref} to {high}",
        "please mark {ref} as {high}",
        "{ref} has become {high}",
        "{ref} is {low} now",
        "Make {ref} {low}",
        "set {ref} to {low}",
        "mark {ref} as {low}",
        "change the priority of {ref} to {low}",
        "Change the priority of {ref} to {medium}",
        "make {ref} {medium}",
        "Move {ref} to {due}",
        "postpone {ref} to {due}",
        "change the due date of {ref} to {due}",
        "{ref} is due {due}",
        "reschedule {ref} for {due}",
        "push {ref} back to {due} please",
        "set the deadline of {ref} to {due}",
        "Remove the due date of {ref}{undue}",
        "{ref} has no deadline{undue}",
        "clear the due date from {ref}{undue}",
        "Assign {ref} to {person}",
        "give {ref} to {person}",
        "{person} takes over {ref}",
        "{ref} goes to {person}",
        "hand {ref} to {person} please",
        'Rename {ref} to "{new}"',
        "rename {ref} to {new}",
        "change the title of {ref} to {new}",
        '{ref} should be called "{new}"',
        "Assign {ref} to {person}, due {due}",
        "Move {ref} to {due}, it is {high}",
        "make {ref} {high} and give it to {person}",
        "{ref} is {low} now, move it to {due}",
    ],
    delete=[
        "Delete {ref}",
        "delete {ref} please",
        "Remove {ref}",
        "remove {ref} from my list",
        "Please remove {ref}",
        "get rid of {ref}",
        "drop {ref}",
        "Forget about {ref}",
        "cancel {ref}",
        "throw away {ref}",
        "we don't need {ref} any more",
        "Can you delete {ref}?",
        "{ref} can be deleted",
        "take {ref} off the list",
        "{ref} is no longer needed",
        "erase {ref}",
        "scrap {ref}",
    ],
    due=[" by {due}", " due {due}", " before {due}", ", due {due}", " on {due}", ", deadline {due}", " until {due}", ", by {due}"],
    high=[" asap", ", it's {high}", ", {high}", " - {high}", " ({high})", ", this is {high}", ", {high}!", " as soon as possible"],
    low=[", no rush", " whenever", ", {low}", " ({low})", ", it's {low}", " - {low}", " some time, no rush", ", this is {low}"],
    person=[
        " for {person}",
        ", assign it to {person}",
        ", {person} will do it",
        " - {person}",
        ", assigned to {person}",
        ", give it to {person}",
    ],
    list_filters=[
        " for {person}",
        " of {person}",
        " due {due}",
        " that are due {due}",
        " that {person} has",
        " assigned to {person}",
        " for {due}",
    ],
)

TEST = Wording(
    titles=[
        Titles(
            split("submit|publish|rephrase|file|shorten|forward"),
            split("grant proposal|the annual newsletter|opening speech|shipping labels|patent draft|insurance claim|the thesis chapter"),
            split("as a flyer|to the museum|as a booklet"),
        ),
        Titles(
            split("install|polish|unpack|donate|borrow|refill"),
            split("smoke detector|brake pads|silver spoons|flower pots|the bird feeder|wool blankets|a step ladder|solar panels"),
            split("outside the harbour|behind the stage|from the neighbours"),
        ),
        Titles(
            split("arrange|reserve|host|rehearse|relocate|talk through"),
            split("hotel suite|concert night|the museum tour|driving exam|wedding toast|a picnic|violin audition"),
            split("beside the lake|under the bridge|for free"),
        ),
        Titles(
            split("patch|benchmark|encrypt|refactor|tidy|inspect"),
            split("the chat widget|router settings|billing service|video encoder|the admin panel|docker images|audit trail"),
            split("across regions|without downtime"),
        ),
    ],
    names=split("Tobias|Amara|Kenji|Lucia|Omar|Freya|Matteo|Nadia|Stefan|Imani|Carla|Ravi"),
    month_days=["april {n}", "september {n}", "february {n}", "2027-05-{n}", "2029-02-{n}"],
    numbers=range(20, 29),
    ids=range(501, 999),
    ref_id=["#{id}", "todo {id}", "todo #{id}", "entry {id}"],
    ref_title=["{title}", '"{title}"', 'the todo "{title}"', "the item {title}"],
    create=[
        "Make a task to {title}{tail}",
        "Hey, could you remind me to {title}{tail}",
        "I have to {title}{tail}",
        "Another task: {title}{tail}",
        "please add this: {title}{tail}",
        'Add the task "{title}"{tail}',
        "I must remember to {title}{tail}",
        "Task: {title}{tail}",
        "we need to {title}{tail}",
        "I'd like to {title}{tail}",
        "There is a {high} task: {title}{tail}",
        "please note a {low} task: {title}{tail}",
        "until {due} I have to {title}{tail}",
        "{person} needs to {title}{tail}",
        "Tell {person} to {title}{tail}",
        "create a task for {person}: {title}{tail}",
    ],
    complete=[
        "{ref} has been done",
        "Please mark {ref} as finished",
        "I have completed {ref}",
        "Close {ref}, it's done",
        "all done with {ref}",
        "we finished {ref} this morning",
        "Consider {ref} complete",
    ],
    list_={
        "open": [
            "Which tasks do I have{tail}?",
            "please list my todos{tail}",
            "what's still open{tail}?",
            "show open items{tail}",
            "Can you show the tasks{tail}?",
            "what tasks are {high}{tail}?",
            "show all {low} todos{tail}",
            "What is {person} working on{tail}?",
            "which tasks are due {due}{tail}?",
        ],
        "done": ["Which tasks have been finished{tail}?", "please list the completed tasks{tail}", "what is already done{tail}?"],
        "all": ["list all tasks, done and open{tail}", "Show every task, both finished and open{tail}"],
    },
    update=[
        "Please make {ref} {high}",
        "the priority of {ref} is now {high}",
        "{ref} should be {low}",
        "consider {ref} {low}",
        "set the priority of {ref} to {medium}",
        "please move {ref} to {due}",
        "the new due date of {ref} is {due}",
        "delay {ref} until {due}",
        "delete the deadline of {ref}{undue}",
        "{ref} does not have a due date any more{undue}",
        "{person} should do {ref}",
        "please assign {ref} to {person}",
        'give {ref} the new title "{new}"',
        "please rename {ref} to {new}",
        "postpone {ref} to {due} and assign it to {person}",
    ],
    delete=[
        "Please delete {ref}",
        "I want {ref} removed",
        "strike {ref} from the list",
        "You can remove {ref}",
        "nobody needs {ref} any more",
        "{ref} should be deleted",
        "drop {ref} from my tasks",
    ],
    due=[" no later than {due}", ", it's due {due}", " latest by {due}", ", to be done by {due}"],
    high=[", and it's {high}", ", really {high}", ", please treat as {high}", ", needed asap"],
    low=[", but it's {low}", ", there is no rush", ", rather {low}"],
    person=[", {person} takes it", ", it goes to {person}", ", please assign to {person}"],
    list_filters=[" which {person} has", " that belong to {person}", " with deadline {due}"],
)
