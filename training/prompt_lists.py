"""The built-in wildcard lists, as data: what `generate` draws prompts and negative prompts from.

Users can draw from them too: `__animal__` in a prompt is a line of the list `animal`. The syntax is that of prompts.py.
Things come with their article ("an owl") or with an adjective that has one ("a young owl"), and so fit anywhere.
`prompt` and `negative`, at the end, are where the generator begins. Nothing here asks for letters in the picture.
"""


def _lines(text: str) -> list[str]:
    """Lines written one after the other, with semicolons between them."""
    return [" ".join(line.split()) for line in text.split(";")]


def _things(described: str, text: str) -> list[str]:
    """Things as "an owl": half of the time with their article, else with one of `described` ("a young|an old")."""
    pairs = [thing.split(" ", 1) for thing in _lines(text)]
    return [f"{{{{{article}}}|{{{described}}}}} {noun}" for article, noun in pairs]


_QUALITIES = {
    "beast": "a young|an old|a curious|a sleepy|a wet|a small|a large|an alert|a lone",
    "person": "a smiling|a cheerful|a calm|a thoughtful|an Indian|a Japanese|a Kenyan|an Ethiopian|a Peruvian"
    "|a Chinese|a Brazilian|a Moroccan|a Vietnamese|a Mexican|a Norwegian|a Nigerian|a Polish|a Korean|a Turkish",
    "adult": "a young|an elderly|a middle-aged|a tall|a smiling|a calm|a focused|an Indian|a Japanese|a Kenyan"
    "|a Brazilian|a Moroccan|a Vietnamese|a Mexican|a Norwegian|a Nigerian|a Polish|a Korean|a Turkish|an Egyptian",
    "building": "an old|an abandoned|a tall|a small|a half-ruined|a snow-covered|an ivy-covered|a newly built"
    "|a white|a weathered|a red-roofed|an imposing",
    "object": "a small|a simple|an elegant|a handmade|a minimalist|a vintage|a modern|a matte black|a pale green"
    "|a glossy red|a worn|an ornate|a two-tone|a cream-colored",
    "vehicle": "a vintage|a rusty|a bright yellow|a dark blue|a red|a muddy|a modern|an old|a polished silver|a white"
    "|a turquoise|a battered",
    "plant": "a small|a large|a potted|a wilting|a lush|a dew-covered|a single|a tall",
    "food": "a freshly made|a rustic|a small|a generous|a simple|a homemade|a colorful",
    "creature": "a huge|an ancient|a small|a friendly|a glowing|a moss-covered|a silver|an emerald green|a sleeping"
    "|a ghostly|a one-eyed",
    "machine": "a damaged|a gleaming|an ancient|a gigantic|a small|a rusted|a white|an experimental|a silent",
}

_LISTS = {
    # What a thing is like.
    "warm_color": _lines("""red; yellow; orange; pink; golden; crimson; burgundy; coral; brown; beige; cream;
        rust"""),
    "cool_color": _lines("""blue; green; purple; turquoise; grey; navy blue; olive green; silver; lavender; teal; mint
        green; indigo"""),
    "color": _lines("""__warm_color__; __cool_color__; __warm_color__; __cool_color__; black; white"""),
    "a_color": _lines("""a red; a blue; a green; a yellow; an orange; a purple; a pink; a white; a black; a grey; a
        brown; a turquoise; a beige; a crimson; an olive green; a golden; a silver; a teal; an indigo; an ivory"""),
    "material": _lines("""wood; glass; brushed steel; marble; porcelain; copper; leather; linen; paper; ceramic;
        bronze; concrete; wool; bamboo; velvet; clay; cork; polished stone; brass; translucent plastic"""),
    "shape": _lines("""cube; sphere; cone; cylinder; pyramid; ring; star; hexagonal box; disc; spiral; torus"""),
    "palette": _lines("""muted colors; vivid colors; warm earth tones; cool blues and greys; pastel colors; black
        and white tones; teal and orange tones; a limited palette of {two|three|four} colors; autumn colors; deep
        jewel tones; __warm_color__ and __cool_color__ tones; soft __color__ tones; high contrast; low contrast;
        faded colors"""),
    # Light, weather, hour.
    "light": _lines("""soft light; hard light from the side; golden light; warm lamplight; candlelight; dappled light;
        diffuse light; backlight; rim light; a single beam of light; soft window light; moonlight; neon light; bright
        midday light; low-key lighting; high-key lighting; dramatic lighting; even light; blue evening light"""),
    "studio_light": _lines("""softbox lighting; rim lighting; a single spotlight; even studio lighting; soft shadows;
        hard shadows; light from above; low-key lighting; backlit; a soft reflection below it"""),
    "hour": _lines("""at dawn; at sunrise; in the early morning; at noon; in the late afternoon; at sunset; at dusk; at
        night; under a full moon; under a sky full of stars; in the blue hour; in the golden hour; on a winter morning;
        on a summer evening; in autumn; in spring; in midsummer"""),
    "weather": _lines("""in light rain; in heavy rain; in thick fog; in the snow; under a clear sky; under a grey sky;
        as a storm comes up; after the rain; in the morning mist; in strong wind; with towering clouds behind; with a
        rainbow in the distance; in the haze of a hot day"""),
    "mood": _lines("""peaceful; dramatic; cozy; melancholic; joyful; mysterious; serene; nostalgic; playful; solemn;
        dreamlike; quiet; energetic; lonely; majestic; tense; tender; whimsical"""),
    # How the picture is made.
    "view": _lines("""seen from above; from a low angle; in the distance; from the side; seen through a window; framed
        by leaves; seen through a doorway; in the center of the frame; off-center with a lot of empty space; filling
        the frame; seen from far away"""),
    "close_view": _lines("""in close-up; in silhouette; reflected in a puddle; seen from behind; head-on; seen from
        below; half hidden in the shadow; lit from one side; casting a long shadow"""),
    "camera": _lines("""shallow depth of field; 35mm photograph; 85mm lens; wide-angle lens; macro photograph;
        telephoto; film grain; long exposure; sharp focus; bokeh; medium format; instant film; black and white
        film; tilt-shift; high shutter speed; natural colors; aerial photograph; motion blur in the background;
        deep focus"""),
    "photo": _lines("""a photo; a photograph; a close-up photo; a wide shot; a black and white photograph; a candid
        photo; a color photograph; an analog photo; a telephoto shot; a professional photograph; a snapshot; a
        documentary photograph; an award-winning photograph"""),
    "art": _things(
        "a detailed|a loose|a delicate|a colorful|an expressive|a moody|a simple|a large|an old",
        """a watercolor painting; an oil painting; a pencil sketch; an ink drawing; a charcoal drawing; a gouache
        painting; a woodblock print; a linocut; a pastel drawing; a digital painting; a vector illustration; a paper
        collage; a mosaic; a stained glass window; a fresco; an acrylic painting; a comic panel; a children's book
        illustration; a pixel art scene; a low-poly 3D render; a clay model; an embroidery; an etching; a chalk
        drawing; a line drawing; an isometric illustration; a cel-shaded drawing; a tapestry; a screen print; a pen and
        wash sketch; a concept art piece; a wooden toy diorama""",
    ),
    "medium": _lines("""watercolor; oil on canvas; ink and wash; thick brushstrokes; flat colors; clean line art; cel
        shading; crosshatching; concept art; storybook illustration; isometric; low poly; pixel art; paper cutout;
        matte painting; gouache; risograph; charcoal; soft pastel; colored pencil"""),
    "school": _lines("""impressionist; art nouveau; art deco; cubist; surrealist; minimalist; baroque; expressionist;
        pointillist; ukiyo-e; bauhaus; folk art; romanticist; constructivist; soft edges; bold outlines; naive art;
        rococo; futurist; stylized"""),
    "detail": _lines("""highly detailed; intricate details; fine texture; rich textures; sharp; crisp; detailed
        background; smooth surfaces"""),
    "finish": _lines("""high resolution; professional; well composed; clean composition; best quality; masterpiece;
        realistic; award-winning; high quality"""),
    "quality": _lines("""__detail__; __finish__"""),
    "backdrop": _lines("""on a white background; on a black background; on __a_color__ background; on a wooden
        table; on a marble surface; on a stone pedestal; on a linen cloth; against a concrete wall; on a mirror;
        on wet black slate; on a bed of moss; on a sandy surface; in front of a soft gradient; on a windowsill;
        on crumpled paper"""),
    # Animals.
    "mammal": _things(
        _QUALITIES["beast"],
        """a red fox; a grey wolf; a brown bear; an otter; a hedgehog; a tabby cat; a black cat; a golden retriever; a
        border collie; a dachshund; a chestnut horse; a donkey; a highland cow; a goat; a sheep; an elephant; a
        giraffe; a zebra; a lion; a tiger; a snow leopard; a cheetah; a rhinoceros; a kangaroo; a koala; a panda; a
        raccoon; a red squirrel; a hare; a deer; an elk; a moose; a badger; a llama; a camel; an alpaca; a bison; a
        mountain goat; a wild boar; a chimpanzee; a lemur; an arctic fox; a lynx; an Irish setter""",
    ),
    "bird": _things(
        _QUALITIES["beast"],
        """a barn owl; an owl; a heron; a kingfisher; a macaw; a flamingo; a penguin; an eagle; a falcon; a robin; a
        crow; a swan; a duck; a rooster; a peacock; a puffin; a hummingbird; a stork; a pelican; a toucan; a magpie; an
        ostrich; a woodpecker; a sparrow; a seagull; an albatross; a goose; a crane""",
    ),
    "sea_animal": _things(
        "a large|a small|a lone|a young|a graceful|an old|a colorful",
        """a sea turtle; an octopus; a jellyfish; a seahorse; a clownfish; a humpback whale; a dolphin; a manta ray; a
        hammerhead shark; a lobster; a hermit crab; a squid; an orca; an eel; a pufferfish; a koi; a lionfish; a
        starfish; a seal; a walrus""",
    ),
    "small_animal": _things(
        "a tiny|a bright green|a spotted|an iridescent|a dew-covered|a brown|an orange|a large",
        """a tree frog; a butterfly; a bumblebee; a dragonfly; a ladybug; a chameleon; an iguana; a gecko; a
        tortoise; a snail; a beetle; a moth; a grasshopper; a salamander; a spider; an ant; a praying mantis; a
        toad; a snake""",
    ),
    "mammal_act": _lines("""running; sleeping; standing still; looking into the camera; drinking; walking; sitting;
        yawning; jumping; lying down; looking back over its shoulder; shaking off water; playing; resting; sniffing the
        air; foraging with its young; watching something in the distance; rolling on its back; carrying a stick"""),
    "bird_act": _lines("""taking off; landing; in flight; perched; spreading its wings; with its beak open; preening
        its feathers; looking straight ahead; carrying a twig; standing on one leg; singing; asleep; diving; feeding
        its young; ruffling its feathers"""),
    "wild_place": _lines("""in a snowy forest; on a mossy rock; at the edge of a lake; in tall grass; in a meadow full
        of wildflowers; on a dusty road; on a rocky slope; in a birch forest; beside a stream; on a frozen lake; in the
        savanna; on a hilltop; among fallen leaves; in a bamboo grove; on a beach; in the desert; between ferns; in an
        orchard; on a country lane; at a waterhole"""),
    "home_place": _lines("""on a sofa; on a windowsill; in a kitchen; on a stone wall; in a barn; on a cobbled street;
        in a garden; on a wooden porch; in a cardboard box; on a red rug; in a wicker basket; on a rooftop; in a
        courtyard; on a park bench; under a table; in a stable"""),
    "perch": _lines("""on a bare branch; on a wooden fence; on a chimney; on a rock in the surf; on a post; in the
        reeds; on a calm pond; above the sea; on a snowy branch; among cherry blossoms; over a wheat field; on a
        windowsill; on a cliff; in a tropical forest; at a bird table"""),
    "sea_place": _lines("""over a coral reef; in clear shallow water; in the deep sea; near the surface; among kelp;
        above white sand; next to a shipwreck; in a beam of sunlight; in a tide pool; in dark water; surrounded by
        small silver fish; in an aquarium; between rocks"""),
    "small_place": _lines("""on a leaf; on a flower; on a wet stone; on tree bark; on a blade of grass; on a mushroom;
        on a fingertip; in the moss; on a twig; on a sunlit wall; on __a_color__ petal; on a rope; on a dry log"""),
    "animal": _lines("__mammal__; __mammal__; __bird__; __sea_animal__; __small_animal__"),
    "animal_scene": _lines("""__mammal__ {__mammal_act__ |}__wild_place__; __mammal__ __mammal_act__ __wild_place__;
        __pet__ {__pet_act__ |}__home_place__; __bird__ {__bird_act__ |}__perch__; __sea_animal__ __sea_place__;
        __small_animal__ __small_place__; {two|three|a pair of|a group of|five} __animals__ __wild_place__; __mammal__
        and __bird__ side by side __wild_place__"""),
    "pet": _things(
        "a young|an old|a fluffy|a sleepy|a small|a scruffy|a curious",
        """a tabby cat; a black cat; a ginger cat; a Siamese cat; a golden retriever; a dachshund; a greyhound; a
        terrier; a sheepdog; a poodle; a rabbit; a guinea pig; a beagle; an Abyssinian cat; an Irish setter""",
    ),
    "pet_act": _lines("""sleeping; sitting upright; stretching; looking up; playing with a ball of yarn; yawning;
        waiting; curled up; chewing a shoe; looking out at the rain; with its head tilted; wearing __a_color__
        collar"""),
    "animals": _lines("""wolves; foxes; sheep; horses; geese; elephants; zebras; deer; rabbits; goats; puppies;
        kittens; meerkats; otters; cranes; bears; highland cows; donkeys; flamingos; penguins"""),
    # People.
    "person": _things(
        _QUALITIES["person"], "a girl; a boy; a grandmother; a grandfather; a student; a child; a teenager"
    )
    + _things(
        _QUALITIES["adult"],
        "a woman; a man; a woman; a man; a traveler; a dancer; a musician; a hiker; a cyclist; an athlete; an artist",
    ),
    "person_act": _lines("""reading a book; drinking tea; laughing; looking out of the window; walking in the rain;
        waiting for a train; playing chess; listening to music; riding a bicycle; flying a kite; feeding pigeons;
        writing in a notebook; holding a bunch of flowers; playing the cello; eating an apple; watching the sea;
        carrying __a_color__ umbrella; dancing; tying a shoelace; peeling an orange; playing the accordion; climbing a
        rock face; skating; doing a handstand; holding a lantern; hanging out the washing; holding a cat; looking
        through a telescope"""),
    "worker": _things(
        _QUALITIES["adult"],
        """a baker kneading dough; a potter shaping a bowl at the wheel; a blacksmith hammering glowing iron; a
        carpenter planing a board; a fisherman mending a net; a farmer driving a tractor; a nurse checking a drip; a
        surgeon putting on gloves; a firefighter rolling up a hose; a teacher at a blackboard; a welder in a shower of
        sparks; a gardener pruning roses; a tailor measuring cloth; a chef plating a dish; a barista pouring milk; a
        scientist looking into a microscope; an electrician on a ladder; an astronomer at a telescope; a weaver at a
        loom; a bricklayer building a wall; a violin maker carving a scroll; a pilot in a cockpit; a postman on a
        bicycle; a beekeeper lifting a honeycomb; a shepherd with a flock; a glassblower turning molten glass; a
        mechanic under a car; a florist tying a bouquet; an architect bending over a model; a diver putting on a mask;
        a conductor raising a baton; a programmer at a desk at night; an engineer inspecting a turbine; a street
        musician playing the saxophone; a vet examining a dog; a winemaker tasting from a barrel; a tea picker with a
        full basket""",
    ),
    "clothes": _lines("""__a_color__ {coat|sweater|dress|shirt|scarf|hat|jacket|raincoat}; a striped
        {shirt|sweater|scarf}; a straw hat; a linen apron; round glasses; overalls; a tweed suit; a hooded cloak; a
        silk kimono; an embroidered vest; a knitted cap; a denim jacket; a patterned sari; a leather jacket; a
        wide-brimmed hat"""),
    "people_place": _lines("""in a park; on a train; in a small kitchen; at a market; in a library; on a rooftop;
        at a bus stop; in a cafe; on a pier; in a workshop; on a mountain path; in a greenhouse; on a busy
        street; in a narrow alley; at a harbor; in a wheat field; on a staircase; in a courtyard; by a campfire;
        in an empty theater"""),
    "people_scene": _lines("""__person__ __person_act__ __people_place__; __person__ in __clothes__ __person_act__;
        __worker__; __worker__ {__hour__|wearing __clothes__}; {two|three|a group of} {friends|children|old
        men|women|travelers|neighbors|musicians} {talking|laughing|playing cards|sharing a
        meal|dancing|waiting|singing} __people_place__; a family {having a picnic|cooking|walking the dog|flying
        kites|crossing a river} {__hour__|__weather__}; __person__ and {a dog|a child|a friend|__mammal__}
        __people_place__; {hands|the hands of __person__} {holding {a key|a compass|a teacup|a candle|a small
        bird|soil}|shaping clay|peeling potatoes|playing the piano|knitting|planting a seedling}"""),
    # Places.
    "landscape": _things(
        "a quiet|a vast|a remote|a sunlit|a misty|an untouched|a windswept|a wide",
        """a mountain lake; a river valley; a sand dune; a pine forest; a rocky coast; a waterfall; a glacier; a
        canyon; a lavender field; a rice terrace; a volcanic island; a salt flat; a fjord; a meadow; a swamp; a beach;
        a wheat field; a birch forest; a vineyard; a cave; an oasis; an ice cave; a moor; a desert plain; a coral
        island; a mountain pass; an alpine pasture; a bamboo forest; a hot spring; a frozen river""",
    ),
    "landscape_detail": _lines("""a lone tree; a small wooden cabin; a winding path; snow-capped mountains behind;
        birds overhead; a stone bridge; grazing sheep; wildflowers in front; a broken fence; a red tent; boulders in
        the foreground; a single hiker in the distance; low clouds; a row of poplars; smoke rising from a chimney"""),
    "landscape_scene": _lines("""__landscape__ __hour__; __landscape__ __weather__; __landscape__ with
        __landscape_detail__; __landscape__ with __landscape_detail__ __hour__; __landscape__ and __landscape_detail__
        __weather__"""),
    "house": _things(
        _QUALITIES["building"],
        """a castle; a cathedral; a farmhouse; a train station; a temple; a mosque; an opera house; a museum; a villa;
        a monastery; a library; a palace; a town hall; a timber-framed house; a hotel; a synagogue; a theater; a
        mansion; an inn; a university""",
    ),
    "structure": _things(
        _QUALITIES["building"],
        """a lighthouse; a windmill; a skyscraper; a pagoda; a concrete apartment block; a glass pavilion; a bridge; a
        barn; a greenhouse; a water tower; an observatory; a factory; a beach hut; an aqueduct; a treehouse; an
        amphitheater; a bungalow; a watchtower; a chapel; a pyramid""",
    ),
    "building": _lines("__house__; __house__; __structure__"),
    "building_part": _lines("""a spiral staircase; an arched doorway; a balcony full of flowers; a row of
        columns; a domed ceiling; a brick facade; a tiled roof; __a_color__ door; a stained glass window; an iron
        gate; a fire escape; a marble staircase; a facade of curved glass; a stone gargoyle; wooden shutters; a
        vaulted corridor"""),
    "building_place": _lines("""on a cliff; at the end of a gravel road; in a dense city; by a canal; on a hill; in a
        snowy village; among cypresses; at the seaside; in a desert; on an island; between two modern towers; in a
        park; at the foot of a mountain; on a river bank; in a fishing village; on an empty square"""),
    "town": _things(
        "a busy|an empty|a quiet|an old|a lively|a colorful|a picturesque",
        """a cobbled alley; a market square; a harbor; a street lined with trees; a fishing village; a hillside town; a
        canal with boats; a city skyline; a night market; a railway platform; a bridge over a river; a rooftop garden;
        a suburban street; an underground station; a street cafe; a shopping arcade; a city park""",
    ),
    "building_scene": _lines("""__building__ __building_place__; __building__ __building_place__ __hour__; __house__
        with __building_part__; __building__ __weather__; __town__ __hour__; __town__ __weather__; __building_part__ of
        __house__; __town__ with {bicycles|lanterns|awnings|pigeons|parked cars|a tram|flower boxes} __hour__"""),
    "room": _things(
        "a bright|a small|a spacious|a cluttered|a cozy|an elegant|a minimalist|a rustic|a dimly lit|an abandoned",
        """a living room; a kitchen; a bedroom; a bathroom; a library; a study; an attic; a hotel lobby; a
        workshop; a dining room; a cafe; an artist's studio; a greenhouse; a loft; a hallway; a nursery; a tea
        room; a wine cellar; an office; a ballroom; a waiting room; a reading nook; a bakery; a barber shop; a
        music room; a laundry room""",
    ),
    "furnishing": _lines("""__a_color__ sofa; a large window; a wooden table; a brick wall; potted plants; a worn
        rug; a fireplace; floor-to-ceiling shelves; a chandelier; exposed beams; __a_color__ armchair; a grand
        piano; checkered floor tiles; a paper lamp; __color__ walls; rattan chairs; a bathtub on lion feet;
        copper pans on the wall; a rocking chair; a skylight; a marble counter; a hammock; a long mirror; velvet
        curtains; an iron stove"""),
    "interior_style": _lines("""Scandinavian; Japanese; mid-century modern; industrial; art deco; Victorian; Moroccan;
        Mediterranean; minimalist; bohemian; farmhouse; brutalist; baroque; colonial; futuristic"""),
    "interior_scene": _lines("""__room__ with __furnishing__; __room__ with __furnishing__ and {a sleeping
        cat|fresh flowers|an open window|a pile of books|a ticking clock|scattered cushions}; __room__ in
        __interior_style__ style with __furnishing__; the interior of __house__ with __furnishing__; __room__ {at
        night|in the morning|in the evening|in winter light}; __person__ {sitting|standing|reading|resting} in
        __room__ with __furnishing__"""),
    # Things.
    "object": _things(
        _QUALITIES["object"],
        """a wristwatch; a teapot; a coffee mug; a perfume bottle; a pair of headphones; a leather bag; a running shoe;
        a ceramic vase; a wooden chair; a desk lamp; a fountain pen; a typewriter; an alarm clock; a film camera; a
        violin; an acoustic guitar; a globe; a compass; a candle; a music box; a toy robot; a teddy bear; an umbrella;
        an hourglass; a chess set; a bicycle bell; a lantern; a key; a jewelry box; a pocket knife; an armchair; a
        kettle; a lipstick; a bar of soap; an earring; a backpack; a pair of glasses; a record player; a snow globe; a
        telescope; an electric shaver; a water bottle; a knitted sweater; a rocking horse; a chess piece""",
    ),
    "made_thing": _lines("""a teapot; a vase; a chair; a lamp; a chess set; a toy robot; an armchair; a lantern;
        a bowl; a bird; a horse; an elephant; a mask; a flower; a clock; a ship; a staircase; a house; an apple;
        a crown"""),
    "product_scene": _lines("""__object__ __backdrop__; __made_thing__ made of __material__ __backdrop__; __object__
        next to __object__ __backdrop__; __object__ with __color__ details __backdrop__; {a row of|a stack of|a pile
        of|three|six} {books|teacups|glass bottles|wooden spoons|marbles|suitcases|seashells|pencils|spools of
        thread|old keys|paper boats|candles} __backdrop__; __object__ {floating in mid-air|half in shadow|surrounded by
        flower petals| splashed with water|lit from within}"""),
    "arrangement": _lines("""__a_color__ __shape__ {on top of|next to|behind|in front of|to the left of|inside|under}
        __a_color__ __shape__; {two|three|four|five|seven} __color__
        {balls|cubes|apples|balloons|bottles|umbrellas|chairs} {and|next to|in front of} {two|three|six} __color__
        {boxes|ribbons|bowls|stones|cups}; __object__ between __object__ and __object__; __a_color__
        {bird|cat|car|flower|boat|hat} on __a_color__ {bench|table|wall|carpet|roof}; __a_color__
        {apple|bowl|book|candle|mug} to the {left|right} of __a_color__ {pear|plate|box|clock|vase}; a __shape__ made
        of __material__ {on|beside} a __material__ {shelf|block|plate}"""),
    "plant": _things(
        _QUALITIES["plant"],
        """a sunflower; a rose; a tulip; a cactus; an orchid; a fern; a bonsai tree; an oak tree; a cherry tree; a
        mushroom; a water lily; a dandelion; an olive tree; a poppy; a lotus; a succulent; a palm tree; a maple tree; a
        thistle; an iris; a pumpkin; a willow; an apple tree; a magnolia; a Venus flytrap""",
    ),
    "plant_scene": _lines("""__plant__ {__hour__|__weather__}; __plant__ in {a walled courtyard|a clay pot|a garden|a
        greenhouse|an open field|a crack in the pavement}; a {bouquet|vase|basket|field|wreath} of
        {poppies|tulips|peonies|wildflowers| daisies|sunflowers|hydrangeas|dried flowers} {__backdrop__|__hour__}; {a
        leaf|a petal|moss|a seed head|tree bark|a fern uncurling|pollen} with {dew drops|fine veins|frost|a tiny
        insect}; a still life with {lemons|pears|grapes|pomegranates|oranges} and {a silver jug|a skull|a candle|a blue
        vase|a lute|oysters}"""),
    # Food.
    "sweet_dish": _things(
        _QUALITIES["food"],
        """a slice of chocolate cake; a stack of pancakes; an apple pie; a fruit salad; an ice cream sundae; a
        croissant; a bowl of porridge; a lemon tart; a cherry pie; a cinnamon roll; a tower of macarons; a waffle; a
        cheesecake; a plate of baklava; a mango pudding; an almond cake""",
    ),
    "savory_dish": _things(
        _QUALITIES["food"],
        """a bowl of ramen; a pizza; a burger; a plate of sushi; an omelette; a cheese board; a curry; a bowl of
        tomato soup; a plate of pasta; a taco; a roast chicken; a paella; a falafel wrap; a bento box; a basket
        of dumplings; a Greek salad; a pot of stew; a plate of couscous; a bowl of jollof rice; an eggplant
        casserole; a masala dosa""",
    ),
    "drink": _lines("""a cup of coffee; a glass of iced tea; an espresso; a glass of orange juice; a pot of green tea;
        a mug of hot chocolate; a glass of lemonade; a cappuccino; a glass of red wine; a smoothie"""),
    "dish": _lines("__sweet_dish__; __savory_dish__; __savory_dish__; __drink__; a loaf of sourdough bread"),
    "sweet_garnish": _lines("""sliced strawberries; powdered sugar; a sprig of mint; a drizzle of honey;
        blueberries; whipped cream; caramel sauce; toasted almonds; edible flowers; melting chocolate; a scoop of
        vanilla ice cream"""),
    "savory_garnish": _lines("""fresh basil; sesame seeds; melting butter; a lemon wedge; chopped herbs; grated cheese;
        chili flakes; pomegranate seeds; a soft-boiled egg; black olives; roasted vegetables; spring onions"""),
    "tableware": _lines("""on a white plate; on a wooden board; on a checkered tablecloth; in a cast-iron pan; on a
        slate plate; in a blue bowl; on a picnic blanket; on a marble counter; on a banana leaf; on a breakfast tray;
        at a street stall; on a bakery shelf; on a diner counter; on a garden table; next to a cup of coffee"""),
    "food_scene": _lines("""__dish__ __tableware__; __savory_dish__ with __savory_garnish__ __tableware__;
        __sweet_dish__ with __sweet_garnish__ __tableware__; __drink__ {on a wooden table|on a breakfast tray|on a
        windowsill|on a bar counter|on a picnic blanket|next to an open book}; __savory_dish__ and __drink__
        __tableware__; {ripe|sliced|fresh|frozen|dried} {peaches|figs|tomatoes| mangoes|cherries|mushrooms|chili
        peppers|oranges|artichokes} __tableware__; {a market stall|a wooden crate|a basket} full of
        {vegetables|spices|bread|fish|citrus fruit|cheese|berries}"""),
    # Vehicles.
    "vehicle": _things(
        _QUALITIES["vehicle"],
        """a pickup truck; a steam locomotive; a bicycle; a motorcycle; a sports car; a camper van; a sailboat; a tram;
        a fishing boat; a hot air balloon; a biplane; a helicopter; a tractor; a double-decker bus; a scooter; a canoe;
        an airship; an electric car; a cargo ship; a convertible; a fire engine; a high-speed train; a racing car; a
        rickshaw; an excavator; a gondola; a seaplane; a cable car; a tugboat; an ambulance""",
    ),
    "vehicle_place": _lines("""in front of a white wall; in the desert; in a city at night; in the rain; under a cloudy
        sky; in a mountain landscape; by the sea; at sunset; in deep snow; in thick fog; in an old harbor town; in
        autumn; with its lights on; covered in dust; loaded with luggage; seen from above; in a museum hall; in a green
        valley"""),
    "vehicle_scene": _lines("""__vehicle__ __vehicle_place__; __vehicle__ __vehicle_place__ __hour__; __vehicle__ and
        __person__ __vehicle_place__; the front of __vehicle__ in close-up"""),
    # What is not of this world.
    "creature": _things(
        _QUALITIES["creature"],
        """a dragon; a unicorn; a griffin; a phoenix; a forest spirit; a giant; a troll; a mermaid; an elf; a dwarf; a
        fairy; a stone golem; a centaur; a sea serpent; a kraken; a winged lion; a walking tree; a fox with nine tails;
        an owl wearing a crown; a mouse knight; a cloud whale; a moon rabbit; a goblin merchant; a water nymph""",
    ),
    "hero": _things(
        "a young|an old|a weary|a brave|a hooded|a mysterious|an unlikely",
        """a wizard; a witch; a knight; an archer; a queen; a bard; a druid; a ranger; an alchemist; a monk; a
        sorceress; a king; a blacksmith; a dragon rider; a pirate captain; a samurai; a map maker; a storyteller""",
    ),
    "fantasy_place": _lines("""in an enchanted forest; on a floating island; in a ruined temple; before a castle gate;
        in a crystal cave; above the clouds; in a village of mushrooms; on a frozen throne; in a library without end;
        on a bridge of light; at the bottom of the sea; in a hall of mirrors; in a garden of glass flowers; on the back
        of a giant turtle; in a tavern; at the edge of the world; in a bottle; under two moons"""),
    "fantasy_scene": _lines("""__creature__ __fantasy_place__; __hero__ __fantasy_place__; __hero__ and __creature__
        __fantasy_place__; __hero__ {holding|guarding|enchanting|carrying} {a glowing orb|an ancient book|a crystal
        sword|a lantern full of stars|a dragon egg|a silver key} __fantasy_place__; {a city|a castle|a tower|a
        village|a ship} {carved into a cliff|made of glass|grown from a giant tree|floating in the sky|inside a
        whale|on stilts}; __animal__ {made of __material__|the size of a house|wearing armor|made of clouds|with wings
        of glass} __fantasy_place__; __mammal__ wearing __clothes__ and {playing the violin|reading a map|having
        tea|steering a ship| baking bread|painting a picture}"""),
    "machine": _things(
        _QUALITIES["machine"],
        """a robot; a spaceship; a space station; a mech; an android; a lunar rover; a drone; a space elevator; a
        cyborg; a hover bike; a satellite; a terraforming machine; an escape pod; a robotic arm; an alien ship; a solar
        sail; a mining vessel; a clockwork automaton""",
    ),
    "sci_fi_place": _lines("""on Mars; in orbit around a ringed planet; in a neon-lit city; in a hangar; on an ice
        moon; in an asteroid field; in a laboratory; in front of a nebula; in a jungle on another planet; under a glass
        dome; in a desert with two suns; in a flooded city; on a landing pad; in a scrapyard; above a gas giant; in a
        greenhouse on the moon; in a long white corridor"""),
    "sci_fi_scene": _lines("""__machine__ __sci_fi_place__; __machine__ {half buried|repairing itself|being
        built|covered in vines|with glowing __color__ lights} __sci_fi_place__; an astronaut {floating|walking|planting
        a tree|holding __object__|riding __vehicle__|meeting __creature__} __sci_fi_place__; __machine__ and __person__
        __sci_fi_place__; {a colony|an outpost|a megacity|an alien temple|a floating market} {on a gas giant|on the
        ocean floor|under a glass dome|inside an asteroid|at the edge of a crater} {with __color__
        lights|__weather__|__hour__}"""),
    # What is nothing but form.
    "form": _lines("""flowing ribbons; concentric circles; overlapping triangles; drops of ink in water; folded paper;
        thin curved lines; crystals; waves of sand; soap bubbles; smoke; woven threads; stacked blocks; melting glass;
        cracked paint; tangled wires; paint splashes; spheres of many sizes; honeycombs; feathers; liquid metal; layers
        of torn paper; broken mirrors; dots in a regular grid; mountains of cubes; a labyrinth"""),
    "abstract_scene": _lines("""__form__ in __warm_color__ and __cool_color__; __form__ on __a_color__ background;
        __form__ made of __material__ with {soft|hard|long|colorful} shadows; __form__ and {gold leaf|ink
        stains|scattered feathers|glowing threads|fine sand|water drops} in __palette__; a pattern of __form__ {in|and}
        __color__ {dots|lines|stripes|squares}; __form__ turning into {birds|__form__|waves|leaves|a face}; a
        {spiral|circle|column|tunnel|wall|cloud} of __form__ with {a glowing center|an empty middle|golden edges| a
        deep __color__ glow}"""),
    # Scenes by where they may be: in daylight and photographed, or in any picture at all.
    "outdoor_scene": _lines("""__animal_scene__; __animal_scene__; __landscape_scene__; __landscape_scene__;
        __building_scene__; __vehicle_scene__; __plant_scene__"""),
    "real_scene": _lines("""__outdoor_scene__; __outdoor_scene__; __outdoor_scene__; __people_scene__;
        __people_scene__; __interior_scene__; __food_scene__; __product_scene__"""),
    "unreal_scene": _lines("__fantasy_scene__; __sci_fi_scene__"),
    "scene": _lines("""__real_scene__; __real_scene__; __real_scene__; __unreal_scene__; __unreal_scene__;
        __arrangement__; __abstract_scene__"""),
    # Whole prompts.
    "thing": _lines("""__animal__; __animal__; __person__; __building__; __object__; __dish__; __plant__; __vehicle__;
        __creature__; __machine__; __hero__; __room__; __landscape__; __town__; __a_color__ __shape__"""),
    "real_thing": _lines("""__animal__; __person__; __building__; __plant__; __vehicle__; a bench; a lamp post; a table
        with {flowers|fruit|books}; __pet__; an umbrella; a bicycle"""),
    "single_thing": _lines("""__animal__; __animal__; __person__; __object__; __plant__; __vehicle__; __creature__;
        __hero__; __machine__"""),
    "short_prompt": _lines("""__thing__; __thing__; __thing__ {__view__|with __color__ {light|shadows}|in __palette__};
        {__thing__|__scene__}, {__light__|__palette__|__mood__}; __thing__ and __thing__; __scene__; __single_thing__
        __close_view__; a portrait of {__person__|__hero__|__mammal__} {in|wearing} __clothes__"""),
    "photo_prompt": _lines("""__photo__ of __real_scene__; __photo__ of __real_scene__, __camera__; __photo__ of
        __real_scene__, __light__, __palette__; __photo__ of __real_scene__, __camera__, __light__, __quality__;
        __real_scene__, __camera__, __light__; __real_scene__, {photo|photograph}, __camera__, __mood__"""),
    "art_prompt": _lines("""__art__ of __scene__; __art__ of __scene__, __palette__; __art__ of __scene__, __school__,
        __light__; __scene__, __medium__, __school__, __palette__; __art__ of __thing__; __art__ showing __scene__ in
        __palette__; __unreal_scene__, {concept art|digital painting|illustration}, __mood__, __light__"""),
    "product_prompt": _lines("""a product photo of __object__ __backdrop__, __studio_light__; __product_scene__,
        __studio_light__, __quality__; a studio photograph of {__object__|__dish__} __backdrop__, __studio_light__; an
        advertising photo of {__object__|__vehicle__|__dish__}, __studio_light__, __palette__"""),
    "sentence_prompt": _lines("""{The|This} {picture|image} shows __scene__. {The mood is __mood__|It has
        __palette__|There is __light__}.; In the foreground there is __thing__, and in the background __landscape__
        __hour__.; We see __scene__, {__view__ and |}with __light__ that makes it look __mood__.; Imagine
        __unreal_scene__: a __mood_a__ moment in __palette__.; On the left is __thing__, on the right __thing__, {and
        between them __thing__|both __backdrop__}.; {A|One} {photo|picture} taken __hour__: __outdoor_scene__, with
        __landscape_detail__.; Make a picture of __scene__, as {__art__|__photo__}.; {Here|Now} we look at __scene__.
        Behind it there is __thing__, and the whole has __palette__.; What you see first is __thing__. Only then do you
        notice __thing__, half hidden in the {shadows|fog|background|grass|corner}."""),
    "mood_a": _lines(
        "peaceful; dramatic; cozy; joyful; mysterious; serene; playful; solemn; quiet; lonely; tense; tender"
    ),
    "tag_prompt": _lines("""__thing__, __mood__, __palette__; __scene__, __light__, __mood__, __quality__; __thing__,
        __view__, __light__, __palette__, __quality__; __outdoor_scene__, __weather__, __light__, __camera__,
        __palette__, __quality__; __scene__, __medium__, __palette__, __light__, __mood__, __quality__; __finish__,
        __detail__, __scene__, __light__; __unreal_scene__, __medium__, __school__, __light__, __palette__, __finish__,
        __detail__"""),
    "long_prompt": _lines("""__photo__ of __real_scene__. There is __real_thing__ nearby, and __light__ falls on
        everything. The picture has __palette__ and feels __mood__, __camera__, __quality__; __art__ of __scene__,
        __school__, with __thing__ in the foreground and __landscape__ in the background, __light__, __palette__,
        __mood__, __quality__; __scene__, __view__, __light__, __palette__, in the background __building__
        {__hour__|__weather__}, __mood__, {__medium__|__school__|__camera__}, __finish__, __detail__"""),
    "prompt": [
        "{3::__short_prompt__|5::__photo_prompt__|4::__art_prompt__|2::__product_prompt__|3::__sentence_prompt__"
        "|3::__tag_prompt__|2::__long_prompt__|1::__abstract_scene__|1::__arrangement__}"
    ],
}

_NEGATIVES = {
    "flaw_sharp": _lines("""blurry; low resolution; jpeg artifacts; noise; grainy; out of focus; pixelated; compression
        artifacts; soft focus; motion blur; smudged; banding"""),
    "flaw_light": _lines("""overexposed; underexposed; oversaturated; washed out; harsh shadows; bad lighting; flat
        lighting; lens flare; chromatic aberration; too dark; low contrast; glare"""),
    "flaw_form": _lines("""distorted; deformed; bad composition; cropped; cut off; duplicate; ugly; amateur;
        unfinished; poorly drawn; tilted horizon; messy; boring; out of frame; bad perspective"""),
    "flaw": _lines("""__flaw_sharp__; __flaw_light__; __flaw_form__; low quality; worst quality"""),
    "hand_flaw": _lines("""bad hands; extra fingers; missing fingers; fused fingers; mutated hands; too many
        fingers"""),
    "body_flaw": _lines("""bad anatomy; extra limbs; crossed eyes; bad proportions; disfigured; long neck; malformed
        limbs; asymmetrical eyes; unnatural pose; two heads; plastic skin; bad face"""),
    "mark_text": _lines("""text; caption; letters; username; date stamp; speech bubble; subtitles; signs; writing"""),
    "mark_frame": _lines("""watermark; signature; logo; border; frame; collage; split screen"""),
    "some_marks": _lines("""__mark_text__; __mark_frame__; __mark_text__, __mark_frame__; text, watermark, logo"""),
    "unwanted_drawing": _lines("""cartoon; anime; painting; sketch; drawing; illustration; comic; pixel art;
        watercolor; line art; oil painting; flat colors; abstract"""),
    "unwanted_render": _lines("""3d render; photo; photorealistic; black and white; monochrome; sepia; cgi; plastic
        look; vintage; clay; minimalist; hdr; low poly; grayscale"""),
    "unwanted_style": _lines("""__unwanted_drawing__; __unwanted_render__; __unwanted_drawing__,
        __unwanted_render__"""),
    "unwanted_color": _lines("""__color__; __color__ tones; dull colors; garish colors; too much __color__; __color__
        background; dark colors; neon colors; pastel colors; __warm_color__ and __cool_color__"""),
    "unwanted_thing": _lines("""people; crowd; cars; dogs; cats; birds; flowers; furniture; hats; glasses; beard;
        hands; faces; boats; fruit; toys; umbrellas; jewelry; clocks; bags; __thing__; __animal__; __object__;
        __vehicle__"""),
    "unwanted_place": _lines("""buildings; trees; clouds; snow; rain; fog; water; grass; windows; power lines;
        background clutter; shadows; sky; night; sunlight; sun; fire; smoke; mountains; rocks; plants; sand; stairs;
        walls; __building__; __landscape__"""),
    "some_flaws": _lines("""__flaw_sharp__, low quality; __flaw_sharp__, __flaw_form__; __flaw_form__, __flaw_light__;
        __flaw_form__, __flaw_sharp__, __flaw_light__; __flaw_sharp__, __flaw_light__, low quality, __flaw_form__"""),
    "negative": _lines("""__flaw__; __unwanted_thing__; __unwanted_style__; blurry, low quality; low quality, worst
        quality; __some_flaws__; __some_flaws__; __some_flaws__, __some_marks__; __some_marks__; __some_flaws__,
        __body_flaw__, __hand_flaw__; __some_flaws__, __hand_flaw__, __body_flaw__, __some_marks__;
        __unwanted_drawing__, __unwanted_render__, __some_flaws__; __unwanted_style__, __unwanted_color__;
        __unwanted_color__, __unwanted_thing__; __unwanted_thing__, __unwanted_place__, __flaw__; __unwanted_place__,
        __unwanted_thing__; __unwanted_color__; __some_flaws__, __unwanted_style__, __unwanted_color__, __some_marks__;
        __mood__, __palette__; __light__, __flaw__; __scene__; __thing__, __some_flaws__; __unwanted_style__,
        __unwanted_thing__, __some_marks__, __some_flaws__; worst quality, __some_flaws__, __body_flaw__,
        __some_marks__, __unwanted_style__"""),
}

BUILT_IN: dict[str, list[str]] = _LISTS | _NEGATIVES
