"""Words that the rule-based perturber knows: groups in which any two exclude each other in one place of a caption.

Our own lists of everyday English, singular and lower case. A word stands in one group only.
"""

from __future__ import annotations

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "pink", "brown", "black", "white", "gray", "turquoise",
          "crimson", "beige", "violet", "magenta")  # fmt: skip
# words that are exchanged for any color but are none of the replacements: their other meanings would mislead
MORE_COLORS = ("grey", "orange", "golden", "silver", "scarlet", "teal", "maroon")
# set phrases in which a color is no color of a thing
NO_COLORS = ("black and white", "black-and-white", "white balance", "blue hour", "golden hour", "golden ratio",
             "red carpet", "green screen", "white house")  # fmt: skip

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

RELATIONS = (  # (phrase, what excludes it)
    ("to the left of", "to the right of"),
    ("on the left of", "on the right of"),
    ("on the left side of", "on the right side of"),
    ("left of", "right of"),
    ("in front of", "behind"),
    ("on top of", "underneath"),
    ("above", "below"),
    ("inside", "outside"),
    ("next to", "far away from"),
    ("beside", "far away from"),
    ("near", "far away from"),
    ("on the left", "on the right"),
    ("in the foreground", "in the background"),
)
ONE_WAY = (  # phrases that are replaced, but that nothing becomes
    ("underneath", "on top of"),
    ("beneath", "above"),
    ("under", "on top of"),
    ("close to", "far away from"),
)

ATTRIBUTES = (
    ("big", "small"), ("large", "tiny"), ("huge", "miniature"), ("giant", "dwarf"), ("tall", "short"),
    ("long", "stubby"), ("young", "old"), ("elderly", "youthful"), ("new", "worn-out"), ("modern", "medieval"),
    ("ancient", "brand-new"), ("happy", "sad"), ("smiling", "crying"), ("angry", "cheerful"), ("clean", "dirty"),
    ("wet", "dry"), ("sunny", "rainy"), ("snowy", "scorched"), ("cloudy", "cloudless"), ("stormy", "windless"),
    ("bright", "dark"), ("open", "closed"), ("full", "empty"), ("crowded", "deserted"), ("fat", "thin"),
    ("wooden", "metallic"), ("fluffy", "scaly"), ("round", "rectangular"), ("standing", "lying"),
    ("running", "sleeping"), ("flying", "swimming"), ("sitting", "jumping"), ("male", "female"), ("day", "night"),
    ("sunrise", "midnight"), ("sunset", "noon"), ("summer", "winter"), ("spring", "autumn"), ("indoors", "outdoors"),
)  # fmt: skip

NOUNS = (  # groups of things, of which one is taken for another
    ("cat", "dog", "horse", "rabbit", "elephant", "lion", "tiger", "bear", "fox", "wolf", "cow", "sheep", "pig",
     "zebra", "giraffe", "monkey", "squirrel", "hedgehog", "deer", "panda", "kitten", "puppy", "raccoon", "camel"),
    ("bird", "owl", "eagle", "parrot", "penguin", "duck", "swan", "chicken", "peacock", "crow", "flamingo"),
    ("fish", "whale", "shark", "dolphin", "octopus", "turtle", "frog", "crab", "jellyfish"),
    ("butterfly", "bee", "spider", "dragonfly", "beetle", "ant", "snail"),
    ("dragon", "unicorn", "phoenix", "mermaid", "robot", "zombie", "vampire", "ghost", "alien", "werewolf"),
    ("man", "woman", "boy", "girl", "child", "baby"),
    ("king", "queen", "knight", "wizard", "witch", "samurai", "pirate", "ninja", "soldier", "astronaut", "prince",
     "princess", "viking", "warrior"),
    ("doctor", "teacher", "chef", "farmer", "painter", "dancer", "firefighter", "scientist", "musician"),
    ("car", "bus", "truck", "train", "bicycle", "motorcycle", "tractor", "tram", "van", "scooter"),
    ("boat", "ship", "submarine", "canoe", "yacht", "raft"),
    ("airplane", "helicopter", "rocket", "balloon", "spaceship", "drone", "plane"),
    ("apple", "banana", "strawberry", "pear", "lemon", "pineapple", "cherry", "watermelon", "peach", "grape"),
    ("pizza", "burger", "cake", "sandwich", "salad", "soup", "sushi", "bread", "cheese", "donut", "cookie", "pancake"),
    ("carrot", "potato", "tomato", "onion", "pumpkin", "mushroom", "cucumber", "broccoli"),
    ("coffee", "tea", "beer", "wine", "milk", "juice", "lemonade"),
    ("chair", "table", "sofa", "bed", "bench", "desk", "lamp", "wardrobe", "bookshelf", "couch", "stool"),
    ("cup", "bottle", "bowl", "plate", "vase", "teapot", "mug", "jar", "fork", "spoon"),
    ("book", "clock", "umbrella", "backpack", "suitcase", "camera", "laptop", "phone", "television", "guitar", "piano",
     "violin", "drum", "trumpet"),
    ("house", "castle", "church", "tower", "temple", "barn", "lighthouse", "skyscraper", "hut", "palace", "windmill",
     "pyramid", "cottage", "cathedral"),
    ("mountain", "beach", "desert", "forest", "river", "lake", "ocean", "waterfall", "volcano", "jungle", "meadow",
     "canyon", "swamp", "island"),
    ("city", "village", "farm", "harbor", "airport", "stadium"),
    ("kitchen", "bedroom", "bathroom", "library", "garage", "classroom", "office", "restaurant"),
    ("tree", "flower", "cactus", "bush", "rose", "sunflower", "tulip"),
    ("hat", "helmet", "crown", "scarf", "mask"),
    ("dress", "suit", "coat", "jacket", "shirt", "sweater", "kimono"),
    ("circle", "square", "triangle", "cross", "star", "hexagon"),
    ("cube", "sphere", "cone", "cylinder"),
    ("sun", "moon", "rainbow", "comet"),
    ("painting", "photograph", "sculpture", "sketch", "cartoon", "mosaic"),
)  # fmt: skip

IRREGULAR = {"man": "men", "woman": "women", "child": "children", "fish": "fish", "sheep": "sheep", "deer": "deer",
             "wolf": "wolves", "cactus": "cacti", "broccoli": "broccoli", "bread": "bread", "sushi": "sushi",
             "potato": "potatoes", "tomato": "tomatoes", "scarf": "scarves", "bookshelf": "bookshelves",
             "werewolf": "werewolves"}  # fmt: skip
