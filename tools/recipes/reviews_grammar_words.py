"""The words of the bundled reviews, good and bad; those after a bar are the test part's alone."""

# aspect: its nouns, what has it, good words, bad words; a plural noun ends in s
ASPECTS = {
    "acting": (
        "acting|performances",
        "film",
        "convincing subtle assured heartfelt natural compelling | nuanced spirited",
        "wooden stiff mannered lifeless unconvincing hammy | stagy half-hearted",
    ),
    "camera": (
        "camerawork|photography",
        "film",
        "gorgeous elegant imaginative beautiful crisp striking | luminous breathtaking",
        "drab ugly murky unimaginative clumsy sloppy | grimy amateurish",
    ),
    "music": (
        "music|score",
        "film",
        "haunting stirring beautiful lively memorable subtle | rousing exquisite",
        "intrusive shrill syrupy monotonous forgettable deafening | cloying grating",
    ),
    "costumes": (
        "costumes|sets",
        "film",
        "gorgeous elegant imaginative striking convincing inspired | sumptuous opulent",
        "ugly drab cheap unconvincing gaudy unimaginative | tawdry shabby",
    ),
    "prose": (
        "prose|writing",
        "book",
        "elegant vivid crisp graceful precise beautiful | supple limpid",
        "clumsy flowery lifeless dull overwrought wooden | turgid bloodless",
    ),
    "characters": (
        "characters",
        "film book",
        "believable memorable likeable vivid engaging convincing | endearing lifelike",
        "flat lifeless unconvincing tiresome forgettable implausible | paper-thin bland",
    ),
    "descriptions": (
        "descriptions",
        "book",
        "vivid precise beautiful memorable evocative striking | sensuous atmospheric",
        "overlong vague flowery monotonous tedious lifeless | long-winded humdrum",
    ),
    "plot": (
        "plot|story",
        "film book",
        "gripping clever inventive surprising engrossing intelligent | ingenious suspenseful",
        "predictable thin muddled far-fetched confused dull | contrived formulaic",
    ),
    "dialogue": (
        "dialogue",
        "film book",
        "witty sharp natural funny believable lively | sparkling eloquent",
        "clumsy stilted wooden trite leaden stiff | corny laboured",
    ),
    "humour": (
        "humour|jokes",
        "film book",
        "sharp clever infectious original delightful inventive | sly irresistible",
        "forced stale lazy childish crude tiresome | puerile embarrassing",
    ),
    "pacing": (
        "pacing",
        "film book",
        "brisk assured taut lively confident exciting | nimble exhilarating",
        "sluggish uneven slow clumsy plodding exhausting | ponderous lethargic",
    ),
    "ending": (
        "ending",
        "film book",
        "satisfying moving surprising powerful memorable fitting | poignant uplifting",
        "rushed hollow abrupt sentimental predictable unconvincing | botched ludicrous",
    ),
}

# said of the whole work
ADJECTIVES = {
    "good": "wonderful charming absorbing memorable delightful gripping moving clever rewarding"
    " superb | enchanting captivating dazzling irresistible",
    "bad": "dull tedious forgettable tiresome boring disappointing awful muddled pretentious hollow"
    " | dismal dreary insipid lacklustre",
}
NOUNS = {
    "good": "masterpiece, triumph, delight, gem, treat, pleasure, joy, success"
    " | marvel, revelation",
    "bad": "bore, mess, chore, disaster, failure, disappointment, waste of time, dud"
    " | shambles, fiasco",
}
# what it did to me: past, infinitive
EFFECTS = {
    "good": "moved me/move me, gripped me/grip me, delighted me/delight me, charmed me/charm me,"
    " thrilled me/thrill me, touched me/touch me, impressed me/impress me"
    " | enthralled me/enthral me, enchanted me/enchant me",
    "bad": "bored me/bore me, annoyed me/annoy me, left me cold/leave me cold,"
    " irritated me/irritate me, exhausted me/exhaust me, disappointed me/disappoint me,"
    " tired me/tire me | wearied me/weary me, tried my patience/try my patience",
}

# what the words of a frame are for each kind of work
KINDS = {
    "film": {
        "works": "films",
        "watch": "watch",
        "watched": "watched",
        "watching": "watching",
        "viewer": "viewer",
        "viewers": "viewers",
        "scene": "scene",
        "scenes": "scenes",
        "trailer": "trailer",
        "end": "closing credits",
        "maker": "director",
    },
    "book": {
        "works": "books",
        "watch": "read",
        "watched": "read",
        "watching": "reading",
        "viewer": "reader",
        "viewers": "readers",
        "scene": "chapter",
        "scenes": "chapters",
        "trailer": "blurb",
        "end": "last page",
        "maker": "author",
    },
}
WORK = {"film": ["film", "film", "movie", "picture"], "book": ["book", "book", "novel"]}
GENRE = {
    "film": ["thriller", "drama", "comedy", "western", "romance", "ghost story", "crime film"],
    "book": [
        "thriller",
        "family saga",
        "romance",
        "ghost story",
        "historical novel",
        "crime novel",
    ],
}
