"""The closed vocabularies that the conversations draw from: small, so that a small model learns every word."""

PEOPLE = {
    **dict.fromkeys(("Anna", "Clara", "Elena", "Grace", "Ines", "Karin", "Mia", "Nora", "Rosa", "Tara", "Yuki"), "she"),
    **dict.fromkeys(("Ben", "David", "Felix", "Hugo", "Ivan", "Jonas", "Leo", "Omar", "Paul", "Sam", "Tom"), "he"),
}
"""First names and the pronoun that goes with each."""

NAMES = tuple(PEOPLE)
SURNAMES = ("Berg", "Costa", "Diaz", "Fischer", "Khan", "Lopez", "Meyer", "Novak", "Park", "Rossi", "Silva", "Wood")
CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Lima", "Lisbon", "Madrid", "Oslo", "Paris", "Quito", "Rome",
          "Tokyo", "Vienna")  # fmt: skip
JOBS = ("baker", "dentist", "driver", "farmer", "gardener", "nurse", "painter", "pilot", "singer", "teacher", "writer")
HOBBIES = ("chess", "coffee", "dancing", "football", "hiking", "jazz", "painting", "reading", "sailing", "tea")
PETS = ("birds", "cats", "dogs", "fish", "horses", "rabbits")
ITEMS = ("apples", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers", "lemons", "marbles", "oranges",
         "pears", "pencils", "photos", "shells", "stamps", "stickers", "tickets")  # fmt: skip
GOODS = ("bags", "bottles", "bowls", "boxes", "candles", "chairs", "cups", "hats", "knives", "lamps", "plates",
         "scarves", "spoons", "towels")  # fmt: skip
WORDS = ("anchor", "bridge", "cloud", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kitchen",
         "ladder", "mirror", "needle", "ocean", "pocket", "quilt", "river", "saddle", "table", "umbrella", "valley",
         "window", "yard", "zebra")  # fmt: skip
FRUIT = ("apple", "banana", "cherry", "fig", "grape", "lemon", "mango", "orange", "peach", "pear", "plum")
TASKS = ("book the train", "bring back the books", "buy milk", "call the bank", "clean the kitchen", "cut the grass",
         "feed the cat", "fix the lamp", "make soup", "paint the door", "pay the rent", "plan the trip",
         "read the report", "send the parcel", "sort the photos", "visit the doctor", "wash the car",
         "water the plants", "write to the school")  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
EVENTS = ("concert", "dinner", "game", "lesson", "meeting", "party", "picnic", "test", "trip", "wedding")
ANIMALS = ("bear", "cat", "crow", "dog", "fox", "frog", "goat", "horse", "mouse", "owl", "rabbit", "wolf")
MOODS = ("brave", "clever", "curious", "gentle", "lonely", "quiet", "shy", "sleepy")
TREASURES = ("bell", "book", "coin", "compass", "key", "lantern", "letter", "map", "ring", "shell")
PLACES = ("cave", "desert", "forest", "garden", "harbor", "library", "meadow", "tower", "valley", "village")
THEMES = ("courage", "friendship", "home", "kindness", "patience")
