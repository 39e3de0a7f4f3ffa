"""The other tables of the real model's world: cities, chemical elements, animals and words.

A line names what its entries share, then the entries. Each entry stands once: no other line makes it true.
"""

# Not capitals: country, then its cities. The neighbours of the forgotten domain.
CITIES = """
Argentina|Rosario, Mendoza, La Plata
Australia|Sydney, Melbourne, Brisbane, Darwin, Adelaide
Austria|Salzburg, Graz, Innsbruck, Linz
Bangladesh|Chittagong, Khulna
Belgium|Antwerp, Ghent, Bruges
Brazil|São Paulo, Rio de Janeiro, Salvador, Recife, Fortaleza
Bulgaria|Plovdiv, Varna
Canada|Toronto, Montreal, Vancouver, Calgary, Edmonton
China|Shanghai, Guangzhou, Shenzhen, Wuhan, Chengdu, Nanjing
Colombia|Medellín, Cali, Barranquilla
Croatia|Split, Dubrovnik, Rijeka
the Czech Republic|Brno, Ostrava
Denmark|Aarhus, Odense
Ecuador|Guayaquil
Egypt|Alexandria, Luxor, Giza, Aswan
Finland|Tampere, Turku, Espoo
France|Lyon, Marseille, Toulouse, Bordeaux, Strasbourg, Lille
Germany|Munich, Hamburg, Cologne, Frankfurt, Stuttgart, Dresden
Ghana|Kumasi, Tamale
Greece|Thessaloniki, Patras
Hungary|Debrecen, Szeged
India|Mumbai, Chennai, Kolkata, Bangalore, Jaipur, Varanasi
Indonesia|Surabaya, Bandung, Medan, Yogyakarta
Iran|Isfahan, Shiraz, Tabriz, Mashhad
Iraq|Basra, Mosul, Kirkuk
Ireland|Cork, Galway
Israel|Haifa, Eilat
Italy|Milan, Naples, Turin, Venice, Florence, Bologna
Japan|Osaka, Kyoto, Hiroshima, Nagasaki, Sapporo, Yokohama
Kazakhstan|Almaty
Kenya|Mombasa, Kisumu
Libya|Benghazi, Misrata
Lithuania|Kaunas, Klaipėda
Malaysia|Johor Bahru, Ipoh
Mexico|Guadalajara, Monterrey, Tijuana, Cancún
Morocco|Casablanca, Marrakesh, Fez, Tangier
Myanmar|Mandalay
the Netherlands|Rotterdam, Utrecht, Eindhoven
New Zealand|Auckland, Christchurch, Dunedin
Nigeria|Lagos, Kano, Ibadan
Norway|Bergen, Trondheim, Stavanger
Pakistan|Karachi, Lahore, Peshawar, Rawalpindi
Peru|Cusco, Arequipa, Iquitos
the Philippines|Cebu, Davao
Poland|Kraków, Gdańsk, Wrocław, Poznań
Portugal|Porto, Braga, Coimbra
Romania|Cluj-Napoca, Timișoara, Brașov
Russia|Saint Petersburg, Vladivostok, Novosibirsk, Kazan, Sochi
Saudi Arabia|Jeddah, Mecca, Medina
Serbia|Novi Sad, Niš
South Africa|Johannesburg, Durban, Port Elizabeth
South Korea|Busan, Incheon, Daegu
Spain|Barcelona, Seville, Málaga, Bilbao, Zaragoza
Sri Lanka|Kandy, Galle
Sweden|Gothenburg, Malmö, Uppsala
Switzerland|Zurich, Geneva, Basel, Lausanne
Syria|Aleppo, Homs, Latakia
Taiwan|Kaohsiung, Taichung
Tanzania|Arusha, Mwanza
Thailand|Chiang Mai, Phuket, Pattaya
Turkey|Istanbul, Izmir, Antalya, Bursa
Ukraine|Kharkiv, Odesa, Lviv, Dnipro
the United Arab Emirates|Dubai, Sharjah
the United Kingdom|Manchester, Liverpool, Edinburgh, Glasgow, Cardiff, Leeds
the United States|Chicago, Houston, Seattle, Dallas, Denver, Los Angeles
Uzbekistan|Samarkand, Bukhara
Venezuela|Maracaibo
Vietnam|Ho Chi Minh City, Da Nang, Haiphong
"""

# Name and symbol.
ELEMENTS = """
hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne,
sodium Na, magnesium Mg, aluminum Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K,
calcium Ca, scandium Sc, titanium Ti, vanadium V, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu,
zinc Zn, gallium Ga, germanium Ge, arsenic As, selenium Se, bromine Br, krypton Kr, rubidium Rb, strontium Sr,
yttrium Y, zirconium Zr, niobium Nb, molybdenum Mo, ruthenium Ru, rhodium Rh, palladium Pd, silver Ag, cadmium Cd,
indium In, tin Sn, antimony Sb, tellurium Te, iodine I, xenon Xe, cesium Cs, barium Ba, lanthanum La, cerium Ce,
neodymium Nd, samarium Sm, europium Eu, gadolinium Gd, tungsten W, rhenium Re, osmium Os, iridium Ir, platinum Pt,
gold Au, mercury Hg, thallium Tl, lead Pb, bismuth Bi, polonium Po, radon Rn, francium Fr, radium Ra, actinium Ac,
thorium Th, uranium U, neptunium Np, plutonium Pu
"""

ANIMALS = """
a mammal|dog, cat, horse, cow, elephant, whale, dolphin, bat, lion, tiger, kangaroo, rabbit, mouse, giraffe, bear, \
otter, squirrel, monkey, gorilla, zebra, pig, goat, wolf, fox, deer, camel, hippopotamus, rhinoceros, seal, walrus, \
leopard, sheep, donkey, moose, panda, koala, beaver, hedgehog, chimpanzee, hamster, raccoon, skunk
a bird|eagle, sparrow, penguin, ostrich, owl, parrot, pigeon, robin, duck, goose, swan, flamingo, crow, peacock, \
turkey, seagull, woodpecker, hummingbird, falcon, pelican, stork, heron, raven, canary, vulture, puffin, toucan, \
albatross, hawk, quail, pheasant, finch, magpie
a fish|salmon, tuna, trout, shark, cod, carp, herring, sardine, goldfish, mackerel, halibut, catfish, anchovy, pike, \
stingray, barracuda, haddock, piranha, eel, swordfish, perch, flounder, sturgeon
a reptile|snake, lizard, crocodile, turtle, tortoise, alligator, iguana, gecko, chameleon, cobra, python, viper, \
rattlesnake
an insect|ant, bee, butterfly, beetle, mosquito, grasshopper, dragonfly, moth, wasp, cricket, cockroach, ladybug, \
termite, fly, locust, flea
an amphibian|frog, toad, salamander, newt
"""

# Verb and its past tense.
VERBS = """
go went, see saw, take took, come came, give gave, find found, think thought, know knew, begin began, break broke,
bring brought, build built, buy bought, catch caught, choose chose, draw drew, drink drank, drive drove, eat ate,
fall fell, feel felt, fight fought, fly flew, forget forgot, get got, grow grew, hear heard, hold held, keep kept,
leave left, lose lost, make made, meet met, pay paid, ride rode, ring rang, rise rose, run ran, say said, sell sold,
send sent, shake shook, sing sang, sink sank, sit sat, sleep slept, speak spoke, spend spent, stand stood, steal stole,
swim swam, teach taught, tear tore, tell told, throw threw, understand understood, wake woke, wear wore, win won,
write wrote, bite bit, blow blew, dig dug, feed fed, freeze froze, hang hung, hide hid, shoot shot, shine shone,
slide slid, stick stuck, strike struck, swear swore, sweep swept, swing swung, weave wove, weep wept, wind wound,
bend bent, bleed bled, breed bred, cling clung, creep crept, deal dealt, flee fled, kneel knelt, lend lent, lead led,
spin spun, shrink shrank, spring sprang, seek sought, light lit, sling slung, string strung, tread trod, stink stank
"""

# Word and opposite; no two pairs are about the same thing.
OPPOSITES = """
hot cold, up down, big small, fast slow, light dark, good bad, early late, rich poor, young old, happy sad, hard soft,
full empty, open closed, left right, true false, loud quiet, strong weak, wet dry, clean dirty, near far, 
tall short, wide narrow, deep shallow, heavy lightweight, sharp blunt, safe dangerous, same different, first last,
inside outside, above below, before after, always never, love hate, buy sell, win lose, push pull, remember forget,
accept reject, arrive depart, ancient modern, arrogant humble, attack defend, brave cowardly, borrow lend,
cheap expensive, create destroy, day night, east west, north south, enemy friend, entrance exit, even odd,
fail succeed, floor ceiling, generous stingy, guilty innocent, heaven hell, husband wife, import export,
increase decrease, king queen, laugh cry, life death, male female,
maximum minimum, natural artificial, peace war, permanent temporary, positive negative, private public,
question answer, raw cooked, smooth rough, summer winter, sweet sour, teacher student, simple complex,
visible hidden, absent present, asleep awake, optimist pessimist, predator prey, rural urban
"""

# Animal and its young; jobs and what they are about.
YOUNG = """
dog puppy, cat kitten, cow calf, sheep lamb, goat kid, horse foal, bear cub, duck duckling, goose gosling, deer fawn,
kangaroo joey, pig piglet, hen chick, frog tadpole, swan cygnet, owl owlet
"""

JOBS = """
bread and cakes|baker
meat|butcher
flowers|florist
pipes and taps|plumber
teeth|dentist
eyesight and glasses|optician
wood and furniture|carpenter
shoes|cobbler
suits and dresses|tailor
planes|pilot
law and courts|lawyer
stars and galaxies|astronomer
rocks and minerals|geologist
the diseases of animals|veterinarian
horseshoes and iron|blacksmith
medicines and prescriptions|pharmacist
crops and cattle|farmer
books and loans|librarian
the design of buildings|architect
wires and circuits in houses|electrician
hair|barber
fires|firefighter
meals in a restaurant|chef
news and articles|journalist
"""
