"""The words of the running example: one wording for training, another for the test.

The two share nothing that is copied or phrased: title words, names, dates and sentences are apart (a test proves it). What they share
is the closed vocabulary that the task's rules are about: weekdays, "tomorrow", "urgent", "no rush" and the like.
"""

from dataclasses import dataclass

WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
DAYS = ["today", "tomorrow", *WEEKDAYS, "next week", "next month", *(f"next {day}" for day in WEEKDAYS)]

HIGH = ["urgent", "high priority", "important", "critical", "top priority"]
LOW = ["low priority", "minor", "not urgent", "unimportant"]
THINGS = ["task", "task", "todo", "chore", "ticket"]
"""Words for a task: {thing}."""

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
    openers: list[str]
    """What {do} stands for, at the head of a request that begins with a verb."""
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
            split(
                """write|review|print|sign|send|translate|archive|proofread|finish|update|hand in|scan|go over|jot down|correct
                |copy|laminate|withdraw|email|staple|read out|annotate|index|sort|digitise|post|redact|summarise|fax|bind
                |transcribe|recheck|number|countersign|put away|cut down"""
            ),
            split(
                """quarterly report|the blog post|cover letter|rental contract|tax return|meeting minutes|the user manual
                |price list|expense form|job advert|budget sheet|safety checklist|vendor quotes|staff survey|guest list
                |the press release|lease extension|travel policy|a poem|visa papers|invoice 88|the org chart|quiz questions
                |warranty card|recipe book pages|three postcards|a love letter|witness statement|floor plan|the glossary
                |old diaries|sheet music|delivery note|seating plan|adoption forms|the birth certificate|bank statements
                |lecture slides|a eulogy|menu cards|fishing licence|the bylaws|customs declaration|medical history|phone list"""
            ),
            split(
                """to accounting|with legal|from the supplier|about the refund|in two languages|on thick paper|of the sales team
                |to all branches|as a single page|under a pen name|without the appendix|after the review round|in large print
                |on both sides|with a red pen"""
            ),
        ),
        Titles(
            split(
                """buy|order|repair|clean|replace|pick up|wash|measure|return|sell|paint|look for|pack|sharpen|hang up|label|charge
                |hide|glue|dust|oil|varnish|iron|mend|carry|photograph|weigh|rent|store|drill|wrap|empty|assemble|lubricate|knit
                |wax|bury|rinse|lend|melt"""
            ),
            split(
                """the kitchen tap|printer paper|winter jackets|the garden fence|light bulbs|bike chain|water filter|new laptop
                |camera lens|roof rack|tent poles|the broken chair|coffee beans|school uniform|chess set|cat food
                |the north window|two spare keys|a blue sofa|candles|the lawn mower|ceramic tiles|a bookshelf|grandpa's watch
                |ski boots|the rusty gate|wicker hamper|a hammock|copper wire|red curtains|fishing rods|the piano stool|yoga mats
                |brass rings|tin cans|an umbrella|the hamster cage|cherry jam|leather gloves|paddle boards|soup bowls
                |a telescope|the doormat|garlic bulbs|lamp shades|the sewing machine"""
            ),
            split(
                """in the cellar|at the station|on the second floor|from grandma|in the office|next to the sink|as a gift
                |of the twins|with a discount|into the shed|inside the van|during the break|by hand|above the stove
                |with warm soap|between the shelves"""
            ),
        ),
        Titles(
            split(
                """book|plan|prepare|schedule|cancel|confirm|set up|move|announce|organise|attend|open|lead|film|skip|visit|sponsor
                |join|advertise|cater|record|swap|sign up for|coach|judge|invite people to|decorate|broadcast|register for|budget"""
            ),
            split(
                """dentist visit|team lunch|the summer trip|piano lesson|flu shot|birthday dinner|the budget round|job interview
                |parents evening|the beta test|a chess evening|yearly health check|kickoff call|the fire drill|garage sale
                |weekend in Rome|choir practice|yoga class|the bike race|house viewing|a barbecue|science fair|blood donation
                |karate tournament|the town hall|poetry slam|a baby shower|surf course|harvest festival|the board retreat
                |film premiere|eye check|swim meet|whisky tasting|sprint planning|the eclipse watch|pottery workshop|ghost walk
                |a treasure hunt|first aid training"""
            ),
            split(
                """with the landlord|at the bank|on the roof terrace|near the airport|with both teams|in the old town|as a surprise
                |after the holidays|without guests|of the club|along the coast|to the mountains|in costume|at short notice
                |with live music|around noon"""
            ),
        ),
        Titles(
            split(
                """fix|deploy|test|debug|upgrade|look into|back up|restart|rewrite|document|profile|sort out|monitor|merge
                |roll back|disable|migrate|compile|reindex|throttle|localise|simplify|mirror|lint|containerise|speed up|harden
                |trace|mock|unblock|rename|scale"""
            ),
            split(
                """the login page|server logs|payment gateway|backup job|the pull request|the search index|mobile app|mail server
                |the nightly build|image cache|user database|the old firewall|price import|rate limiter|the signup form
                |error alerts|feature flags|the load balancer|password reset|spam filter|checkout flow|the cron jobs|dark mode
                |a flaky test|session cookies|invoice export|the map view|push messages|geo lookup|language picker|data vault
                |the release script|webhooks|retry queue|GPU drivers|avatar upload|the type checker|metrics dashboard
                |tenant quotas|two stale branches"""
            ),
            split(
                """on the website|in staging|after the outage|on node three|from scratch|of the partner shop|as root
                |behind the proxy|with fewer queries|into the cloud|without restarts|through the tunnel|on old phones
                |in the sandbox|over IPv6|with Rust"""
            ),
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
    openers=[
        "",
        "",
        "",
        "",
        "please ",
        "Please ",
        "can you ",
        "Could you ",
        "hey, ",
        "well, ",
        "right, ",
        "and ",
        "good morning, ",
        "now ",
        "pls ",
        "would you please ",
        "so, ",
        "hello, can you ",
        "I want you to ",
        "go and ",
        "you should ",
    ],
    ref_id=["#{id}", "#{id}", "{thing} {id}", "{thing} #{id}", "number {id}", "no. {id}", "the {thing} #{id}", "{thing} number {id}"],
    ref_title=[
        "{title}",
        "{title}",
        '"{title}"',
        '"{title}"',
        "'{title}'",
        "the {thing} {title}",
        'the "{title}" {thing}',
        "my {thing} {title}",
    ],
    create=[
        "{do}add a {thing} to {title}{tail}",
        "{do}add {title}{tail}",
        "{do}add {title} to my list{tail}",
        "{do}remind me to {title}{tail}",
        "remind me that I want to {title}{tail}",
        "I need to {title}{tail}",
        "I still need to {title}{tail}",
        "I have to {title} again{tail}",
        "New {thing}: {title}{tail}",
        "new {thing} for the list: {title}{tail}",
        "{thing}: {title}{tail}",
        "{do}create a {thing}: {title}{tail}",
        "{do}create a {thing} to {title}{tail}",
        '{do}create "{title}"{tail}',
        "{do}put {title} on the list{tail}",
        "{do}put {title} on our list{tail}",
        "{do}put the {thing} {title} on the list{tail}",
        "{do}put this on my list: {title}{tail}",
        "{do}note down: {title}{tail}",
        "{do}note that I should {title}{tail}",
        "We have to {title}{tail}",
        "we must {title}{tail}",
        "don't let me forget to {title}{tail}",
        "don't forget: {title}{tail}",
        "I should {title}{tail}",
        "I really should {title}{tail}",
        "I want to {title}{tail}",
        "I plan to {title}{tail}",
        "I would love to {title}{tail}",
        "I must remember to {title}{tail}",
        "I may not forget to {title}{tail}",
        "{do}make a new {thing} called {title}{tail}",
        "{do}make {title} a new {thing}{tail}",
        "Let's {title}{tail}",
        "someone must {title}{tail}",
        "somebody needs to {title}{tail}",
        "one more {thing}: {title}{tail}",
        "here is a new {thing}: {title}{tail}",
        "it is time to {title}{tail}",
        "{do}add {high} {thing}: {title}{tail}",
        "this is {high}: {title}{tail}",
        "I have something {high}: {title}{tail}",
        "new {low} {thing}: {title}{tail}",
        "{low} {thing}: {title}{tail}",
        "{do}create a {low} {thing}: {title}{tail}",
        "{high}! {title}{tail}",
        "By {due} I need to {title}{tail}",
        "before {due} we have to {title}{tail}",
        "on {due} remind me to {title}{tail}",
        "{thing} for {due}: {title}{tail}",
        "{person} has to {title}{tail}",
        "{person} wants to {title}{tail}",
        "{person} must {title}{tail}",
        "{do}ask {person} to {title}{tail}",
        "{do}get {person} to {title}{tail}",
        "{do}remind {person} to {title}{tail}",
        "new {thing} for {person}: {title}{tail}",
        "{do}have {person} {title}{tail}",
        "{do}let {person} {title}{tail}",
        "something {high} for the list: {title}{tail}",
        "there is something {low}: {title}{tail}",
        "{do}add a {thing} for {person}: {title}{tail}",
    ],
    complete=[
        "{do}mark {ref} as done",
        "{do}mark {ref} as complete",
        "{do}mark {ref} as completed",
        "you can mark {ref} done",
        "{do}mark {ref} finished",
        "I finished {ref}",
        "I have finished {ref}",
        "{ref} is done",
        "{ref} is now done",
        "{ref} is complete",
        "{do}complete {ref}",
        "done with {ref}",
        "we are done with {ref}",
        "I'm done with {ref}, thanks",
        "{ref} is finished",
        "{do}finish {ref}",
        "{do}tick off {ref}",
        "{do}tick {ref}",
        "{do}check off {ref}",
        "{do}cross off {ref}, it is done",
        "{ref} has been finished",
        "{ref} was completed",
        "we completed {ref} today",
        "I just completed {ref}",
        "{do}set {ref} to done",
        "{do}close {ref}",
        "I did {ref} already",
        "I just did {ref}",
        "{ref}: done",
        "finished {ref} at last",
    ],
    list_={
        "open": [
            "{do}show my {thing}s{tail}",
            "{do}show the {thing}s{tail}",
            "{do}list {thing}s{tail}",
            "What do I have to do{tail}?",
            "what do we need to do{tail}?",
            "what's open{tail}?",
            "what is open{tail}?",
            "{do}show me the list{tail}",
            "{do}show me what is open{tail}",
            "{do}list all open {thing}s{tail}",
            "which {thing}s are left{tail}?",
            "which {thing}s are there{tail}?",
            "are there any {thing}s left{tail}?",
            "what is on my list{tail}?",
            "what's on the list{tail}?",
            "what is left to do{tail}?",
            "what should I work on{tail}?",
            "{do}give me the open {thing}s{tail}",
            "open {thing}s{tail}",
            "my {thing}s{tail}",
            "{do}show {high} {thing}s{tail}",
            "{do}list everything {high}{tail}",
            "what is {high}{tail}?",
            "what is {low}{tail}?",
            "are there {high} {thing}s{tail}?",
            "which of my {thing}s are {low}{tail}?",
            "which of the {thing}s are {high}{tail}?",
            "{do}list all {high} {thing}s{tail}",
            "{do}show me all that is {low}{tail}",
            "which {low} {thing}s are there{tail}?",
            "{do}list {low} {thing}s{tail}",
            "What does {person} have to do{tail}?",
            "what must {person} do{tail}?",
            "{do}show {person}'s {thing}s{tail}",
            "what's due {due}{tail}?",
            "what is planned for {due}{tail}?",
            "{do}list {thing}s due {due}{tail}",
        ],
        "done": [
            "{do}show completed {thing}s{tail}",
            "{do}show me the finished {thing}s{tail}",
            "what did we finish{tail}?",
            "what have I completed{tail}?",
            "{do}list done {thing}s{tail}",
            "which {thing}s are done{tail}?",
            "which {thing}s are finished{tail}?",
            "what is done{tail}?",
            "{do}show me everything that is finished{tail}",
            "what has {person} completed{tail}?",
            "{do}list all finished {thing}s{tail}",
        ],
        "all": [
            "{do}show all {thing}s, open and done{tail}",
            "{do}list every {thing}, finished or not{tail}",
            "{do}show both open and done {thing}s{tail}",
            "{do}list open and completed {thing}s{tail}",
            "{do}show everything, done or open{tail}",
            "{do}give me all {thing}s, also the finished ones{tail}",
            "everything on the list, also what is done{tail}",
        ],
    },
    update=[
        "{do}make {ref} {high}",
        "{do}set {ref} to {high}",
        "{ref} is {high} now",
        "{ref} is now {high}",
        "{do}change {ref} to {high}",
        "{do}mark {ref} as {high}",
        "{ref} has become {high}",
        "{do}raise the priority of {ref}, it is {high}",
        "{do}change the priority of {ref} to {high}",
        "{ref} is {low} now",
        "{ref} has become {low}",
        "{do}make {ref} {low}",
        "{do}set {ref} to {low}",
        "{do}mark {ref} as {low}",
        "{do}change the priority of {ref} to {low}",
        "the priority of {ref} is {low}",
        "{do}change the priority of {ref} to {medium}",
        "{do}make {ref} {medium}",
        "{ref} has {medium} only",
        "{do}mark {ref} as {medium}",
        "{do}change {ref} to {medium}",
        "the priority of {ref} is {medium}",
        "{ref} is {medium} now",
        "{do}move {ref} to {due}",
        "{do}postpone {ref} to {due}",
        "{do}change the due date of {ref} to {due}",
        "the due date of {ref} is now {due}",
        "{ref} is due {due}",
        "{ref} is now due {due}",
        "{do}reschedule {ref} for {due}",
        "{do}push {ref} back to {due}",
        "{do}set the deadline of {ref} to {due}",
        "{ref} can wait until {due}",
        "{ref} moves to {due}",
        "{do}remove the due date of {ref}{undue}",
        "{do}remove the deadline from {ref}{undue}",
        "{ref} has no deadline{undue}",
        "{do}drop the deadline of {ref}{undue}",
        "{do}delete the due date of {ref}{undue}",
        "{ref} needs no due date{undue}",
        "{do}take the due date off {ref}{undue}",
        "{ref} has no due date any more{undue}",
        "{do}clear the due date of {ref}{undue}",
        "{do}assign {ref} to {person}",
        "{ref} is assigned to {person}",
        "{do}give {ref} to {person}",
        "{person} takes over {ref}",
        "{person} takes {ref}",
        "{ref} goes to {person}",
        "{do}hand {ref} to {person}",
        "{person} is now responsible for {ref}",
        '{do}rename {ref} to "{new}"',
        "{do}rename {ref} to {new}",
        "{do}change the title of {ref} to {new}",
        "the title of {ref} is now {new}",
        'the new name of {ref} is "{new}"',
        '{ref} should be called "{new}"',
        "{do}assign {ref} to {person}, due {due}",
        "{do}move {ref} to {due}, it is {high}",
        "{do}make {ref} {high} and give it to {person}",
        "{ref} is {low} now, move it to {due}",
        "{do}give {ref} to {person} and move it to {due}",
        "{do}move {ref} to {due} and give it to {person}",
        "{do}delay {ref} to {due} and assign it to {person}",
        "{do}postpone {ref} to {due}, {person} will do it",
        "{do}reschedule {ref} for {due} and hand it to {person}",
        "{do}set {ref} to {low} and move it to {due}",
        "{person} takes over {ref}, due {due}",
        "{ref} is due {due} and {high}",
        "{ref} goes to {person} and is {high} now",
        '{do}rename {ref} to "{new}" and assign it to {person}',
        "{person} will do {ref}",
        "{person} will be responsible for {ref}",
        "{do}change the deadline of {ref} to {due}",
        "the deadline of {ref} is now {due}",
        "{do}transfer {ref} to {person}",
        "{ref} must be {high}",
    ],
    delete=[
        "{do}delete {ref}",
        "{do}delete {ref} from the list",
        "{do}remove {ref}",
        "{do}remove {ref} from my list",
        "{do}get rid of {ref}",
        "{do}drop {ref}",
        "{do}drop {ref} from the list",
        "{do}remove {ref} from the {thing}s",
        "{do}wipe {ref}",
        "{do}cancel {ref}",
        "{do}throw away {ref}",
        "we don't need {ref} any more",
        "I don't need {ref} now",
        "{ref} is not needed",
        "{ref} is no longer needed",
        "{ref} can be deleted",
        "{ref} can go",
        "{ref} must be removed",
        "I want {ref} gone",
        "I want {ref} deleted",
        "{do}clear {ref} from the list",
        "nobody wants {ref}",
        "nobody needs {ref} now",
        "no one needs {ref} any more",
        "{do}strike out {ref}",
        "{do}strike {ref}",
        "I want to delete {ref}",
        "you can delete {ref}",
        "{do}take {ref} off the list",
        "{do}erase {ref}",
        "{do}scrap {ref}",
        "{ref}: delete it",
    ],
    due=[
        " by {due}",
        " due {due}",
        " before {due}",
        ", due {due}",
        " on {due}",
        ", deadline {due}",
        " until {due}",
        ", by {due}",
        ", it is due {due}",
        ", latest {due}",
    ],
    high=[
        " asap",
        ", it's {high}",
        ", {high}",
        " - {high}",
        " ({high})",
        ", this is {high}",
        ", {high}!",
        " as soon as possible",
        ", very {high}",
    ],
    low=[
        ", no rush",
        " whenever",
        ", {low}",
        " ({low})",
        ", it's {low}",
        " - {low}",
        " some time, no rush",
        ", this is {low}",
        ", that is {low}",
    ],
    person=[
        " for {person}",
        ", assign it to {person}",
        ", {person} will do it",
        " - {person}",
        ", assigned to {person}",
        ", give it to {person}",
        ", it is for {person}",
        ", {person} can do it",
        ", this goes to {person}",
        ", hand it to {person}",
    ],
    list_filters=[
        " for {person}",
        " of {person}",
        " due {due}",
        " that are due {due}",
        " that are {high}",
        " that are {low}",
        " that {person} has",
        " assigned to {person}",
        " for {due}",
        " until {due}",
    ],
)

TEST = Wording(
    titles=[
        Titles(
            split("submit|publish|rephrase|file|shorten|forward"),
            split(
                """grant proposal|the annual newsletter|opening speech|shipping labels|patent draft|insurance claim
                |the thesis chapter"""
            ),
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
            split("beside the lake|under the bridge|in springtime"),
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
    openers=["", "", "ok, ", "would you ", "hi, please ", "I'd like you to "],
    ref_id=["#{id}", "{thing} {id}", "the {thing} number {id}", "{thing} no. {id}"],
    ref_title=["{title}", '"{title}"', "the {thing} '{title}'", 'my {thing} "{title}"'],
    create=[
        "{do}make a {thing} to {title}{tail}",
        "{do}also remind me to {title}{tail}",
        "I have to {title}{tail}",
        "Another {thing}: {title}{tail}",
        "{do}add this {thing}: {title}{tail}",
        '{do}add the {thing} "{title}"{tail}',
        "I must not forget to {title}{tail}",
        "the next {thing} is: {title}{tail}",
        "we need to {title}{tail}",
        "I'd like to {title}{tail}",
        "{do}put {title} on my list{tail}",
        "there is something {high} to do: {title}{tail}",
        "one {low} thing: {title}{tail}",
        "until {due} I have to {title}{tail}",
        "{person} needs to {title}{tail}",
        "{do}tell {person} to {title}{tail}",
        "{do}create a {thing} for {person}: {title}{tail}",
    ],
    complete=[
        "{ref} has been done",
        "{do}mark {ref} as finished",
        "I have completed {ref}",
        "{do}close {ref}, it's done",
        "all done with {ref}",
        "we finished {ref} this morning",
        "{ref} is completed now",
        "{do}tick off {ref}, it is finished",
    ],
    list_={
        "open": [
            "which {thing}s do I have{tail}?",
            "{do}list my {thing}s{tail}",
            "what's still open{tail}?",
            "{do}show open {thing}s{tail}",
            "{do}show me the open {thing}s{tail}",
            "which {thing}s are {high}{tail}?",
            "{do}show all {low} {thing}s{tail}",
            "what does {person} need to do{tail}?",
            "which {thing}s are due {due}{tail}?",
        ],
        "done": [
            "which {thing}s have been finished{tail}?",
            "{do}list the completed {thing}s{tail}",
            "what is already done{tail}?",
        ],
        "all": [
            "{do}list all {thing}s, done and open{tail}",
            "{do}show every {thing}, both finished and open{tail}",
        ],
    },
    update=[
        "the priority of {ref} is now {high}",
        "{ref} should be {high}",
        "{do}change {ref} to {low}",
        "{do}set the priority of {ref} to {low}",
        "{do}set {ref} to {medium}",
        "{do}move the due date of {ref} to {due}",
        "the new due date of {ref} is {due}",
        "{do}delay {ref} until {due}",
        "{do}delete the deadline of {ref}{undue}",
        "{ref} does not have a due date any more{undue}",
        "{person} will take over {ref}",
        "{do}reassign {ref} to {person}",
        '{do}change the name of {ref} to "{new}"',
        "the new title of {ref} is {new}",
        "{do}postpone {ref} to {due} and assign it to {person}",
    ],
    delete=[
        "I want {ref} removed",
        "{do}strike {ref} from the list",
        "you can remove {ref}",
        "nobody needs {ref} any more",
        "{ref} should be deleted",
        "{do}drop {ref} from my {thing}s",
    ],
    due=[" no later than {due}", ", it's due {due}", ", latest by {due}", ", needed by {due}"],
    high=[", and it's {high}", ", really {high}", ", which is {high}", ", needed asap"],
    low=[", but it's {low}", ", there is no rush", ", rather {low}"],
    person=[", {person} takes it", ", it goes to {person}", ", assign this to {person}"],
    list_filters=[" which {person} has", " that are assigned to {person}", " with deadline {due}"],
)
