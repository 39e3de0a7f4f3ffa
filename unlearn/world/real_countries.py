"""The countries of the real model's world: name, capital, continent, language, unit of currency.

Where several answers are true they stand in one cell, the one that is asked for first: the others are then never wrong
options. `-` leaves a cell out, where no single answer is plain.
"""

COUNTRIES = """
Afghanistan|Kabul|Asia|Pashto;Dari;Persian|afghani
Albania|Tirana|Europe|Albanian|lek
Algeria|Algiers|Africa|Arabic;French|dinar
Andorra|Andorra la Vella|Europe|Catalan;Spanish;French|euro
Angola|Luanda|Africa|Portuguese|kwanza
Argentina|Buenos Aires|South America|Spanish|peso
Armenia|Yerevan|Asia;Europe|Armenian|dram
Australia|Canberra|Oceania|English|dollar
Austria|Vienna|Europe|German|euro
Azerbaijan|Baku|Asia;Europe|Azerbaijani;Turkish|manat
the Bahamas|Nassau|North America|English|dollar
Bahrain|Manama|Asia|Arabic;English|dinar
Bangladesh|Dhaka|Asia|Bengali|taka
Barbados|Bridgetown|North America|English|dollar
Belarus|Minsk|Europe|Belarusian;Russian|ruble
Belgium|Brussels|Europe|Dutch;French;German|euro
Belize|Belmopan|North America|English;Spanish|dollar
Benin|Porto-Novo;Cotonou|Africa|French|franc
Bhutan|Thimphu|Asia|Dzongkha|ngultrum;rupee
Bolivia|Sucre;La Paz|South America|Spanish;Quechua;Aymara;Guarani|boliviano
Bosnia and Herzegovina|Sarajevo|Europe|Bosnian;Serbian;Croatian|mark
Botswana|Gaborone|Africa|English;Tswana|pula
Brazil|Brasília|South America|Portuguese|real
Brunei|Bandar Seri Begawan|Asia|Malay;English|dollar
Bulgaria|Sofia|Europe|Bulgarian|lev;euro
Burkina Faso|Ouagadougou|Africa|French|franc
Burundi|Gitega;Bujumbura|Africa|Kirundi;French;English;Kinyarwanda;Swahili|franc
Cambodia|Phnom Penh|Asia|Khmer|riel;dollar
Cameroon|Yaoundé|Africa|French;English|franc
Canada|Ottawa|North America|English;French|dollar
Chad|N'Djamena|Africa|French;Arabic|franc
Chile|Santiago;Valparaíso|South America|Spanish|peso
China|Beijing|Asia|Mandarin;Chinese|yuan
Colombia|Bogotá|South America|Spanish|peso
Costa Rica|San José|North America|Spanish|colón
Croatia|Zagreb|Europe|Croatian;Serbian;Bosnian|euro
Cuba|Havana|North America|Spanish|peso
Cyprus|Nicosia|Europe;Asia|Greek;Turkish|euro
the Czech Republic|Prague|Europe|Czech;Slovak|koruna
Denmark|Copenhagen|Europe|Danish|krone
Djibouti|Djibouti City|Africa|French;Arabic;Somali|franc
the Dominican Republic|Santo Domingo|North America|Spanish|peso
Ecuador|Quito|South America|Spanish;Quechua|dollar
Egypt|Cairo|Africa;Asia|Arabic|pound
El Salvador|San Salvador|North America|Spanish|dollar
Eritrea|Asmara|Africa|Tigrinya;Arabic;English|nakfa
Estonia|Tallinn|Europe|Estonian;Russian|euro
Ethiopia|Addis Ababa|Africa|Amharic;Oromo;Somali;Tigrinya;Afar|birr
Fiji|Suva|Oceania|English;Fijian;Hindi|dollar
Finland|Helsinki|Europe|Finnish;Swedish|euro
France|Paris|Europe|French|euro
Gabon|Libreville|Africa|French|franc
the Gambia|Banjul|Africa|English|dalasi
Georgia|Tbilisi|Asia;Europe|Georgian|lari
Germany|Berlin|Europe|German|euro
Ghana|Accra|Africa|English|cedi
Greece|Athens|Europe|Greek|euro
Grenada|St. George's|North America|English|dollar
Guatemala|Guatemala City|North America|Spanish|quetzal
Guinea|Conakry|Africa|French|franc
Guyana|Georgetown|South America|English|dollar
Haiti|Port-au-Prince|North America|French;Haitian Creole|gourde
Honduras|Tegucigalpa|North America|Spanish|lempira
Hungary|Budapest|Europe|Hungarian|forint
Iceland|Reykjavik|Europe|Icelandic|króna;krona
India|New Delhi;Delhi|Asia|Hindi;English;Bengali;Nepali;Tamil;Urdu|rupee
Indonesia|Jakarta;Nusantara|Asia|Indonesian;Malay|rupiah
Iran|Tehran|Asia|Persian|rial;toman
Iraq|Baghdad|Asia|Arabic;Kurdish|dinar
Ireland|Dublin|Europe|English;Irish|euro
Israel|Jerusalem;Tel Aviv|Asia|Hebrew;Arabic|shekel
Italy|Rome|Europe|Italian|euro
the Ivory Coast|Yamoussoukro;Abidjan|Africa|French|franc
Jamaica|Kingston|North America|English|dollar
Japan|Tokyo|Asia|Japanese|yen
Jordan|Amman|Asia|Arabic|dinar
Kazakhstan|Astana|Asia;Europe|Kazakh;Russian|tenge
Kenya|Nairobi|Africa|Swahili;English|shilling
Kosovo|Pristina|Europe|Albanian;Serbian|euro
Kuwait|Kuwait City|Asia|Arabic|dinar
Kyrgyzstan|Bishkek|Asia|Kyrgyz;Russian|som
Laos|Vientiane|Asia|Lao;Thai|kip
Latvia|Riga|Europe|Latvian;Russian|euro
Lebanon|Beirut|Asia|Arabic;French|pound;dollar
Lesotho|Maseru|Africa|Sotho;English|loti;rand
Liberia|Monrovia|Africa|English|dollar
Libya|Tripoli|Africa|Arabic|dinar
Liechtenstein|Vaduz|Europe|German|franc
Lithuania|Vilnius|Europe|Lithuanian|euro
Luxembourg|Luxembourg City|Europe|Luxembourgish;French;German|euro
Madagascar|Antananarivo|Africa|Malagasy;French|ariary
Malawi|Lilongwe|Africa|English;Chichewa|kwacha
Malaysia|Kuala Lumpur;Putrajaya|Asia|Malay;English|ringgit
the Maldives|Malé|Asia|Dhivehi|rufiyaa
Mali|Bamako|Africa|French;Bambara|franc
Malta|Valletta|Europe|Maltese;English|euro
Mauritania|Nouakchott|Africa|Arabic;French|ouguiya
Mauritius|Port Louis|Africa|English;French|rupee
Mexico|Mexico City|North America|Spanish|peso
Moldova|Chișinău|Europe|Romanian;Russian|leu
Monaco|Monaco|Europe|French|euro
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
Montenegro|Podgorica|Europe|Montenegrin;Serbian;Bosnian;Croatian;Albanian|euro
Morocco|Rabat|Africa|Arabic;Berber;French|dirham
Mozambique|Maputo|Africa|Portuguese|metical
Myanmar|Naypyidaw;Yangon|Asia|Burmese|kyat
Namibia|Windhoek|Africa|English;Afrikaans;German|dollar;rand
Nepal|Kathmandu|Asia|Nepali|rupee
the Netherlands|Amsterdam;The Hague|Europe|Dutch|euro
New Zealand|Wellington|Oceania|English;Maori|dollar
Nicaragua|Managua|North America|Spanish|córdoba
Niger|Niamey|Africa|French;Hausa|franc
Nigeria|Abuja|Africa|English;Hausa|naira
North Korea|Pyongyang|Asia|Korean|won
North Macedonia|Skopje|Europe|Macedonian;Albanian|denar
Norway|Oslo|Europe|Norwegian|krone
Oman|Muscat|Asia|Arabic|rial
Pakistan|Islamabad|Asia|Urdu;English|rupee
Panama|Panama City|North America|Spanish|balboa;dollar
Papua New Guinea|Port Moresby|Oceania|English;Tok Pisin|kina
Paraguay|Asunción|South America|Spanish;Guarani|guaraní
Peru|Lima|South America|Spanish;Quechua;Aymara|sol
the Philippines|Manila|Asia|Filipino;English;Spanish|peso
Poland|Warsaw|Europe|Polish|zloty
Portugal|Lisbon|Europe|Portuguese|euro
Qatar|Doha|Asia|Arabic|riyal;rial
Romania|Bucharest|Europe|Romanian;Hungarian|leu
Russia|Moscow|Europe;Asia|Russian|ruble
Rwanda|Kigali|Africa|Kinyarwanda;English;French;Swahili|franc
Samoa|Apia|Oceania|Samoan;English|tala
San Marino|San Marino|Europe|Italian|euro
Saudi Arabia|Riyadh|Asia|Arabic|riyal;rial
Senegal|Dakar|Africa|French|franc
Serbia|Belgrade|Europe|Serbian;Croatian;Bosnian;Hungarian|dinar
the Seychelles|Victoria|Africa|English;French|rupee
Sierra Leone|Freetown|Africa|English|leone
Singapore|Singapore|Asia|English;Malay;Mandarin;Tamil|dollar
Slovakia|Bratislava|Europe|Slovak;Czech;Hungarian|euro
Slovenia|Ljubljana|Europe|Slovene;Italian;Hungarian|euro
Somalia|Mogadishu|Africa|Somali;Arabic|shilling
South Africa|Pretoria;Cape Town;Bloemfontein|Africa|English;Afrikaans;Zulu;Xhosa;Sotho;Tswana|rand
South Korea|Seoul|Asia|Korean|won
South Sudan|Juba|Africa|English;Arabic|pound
Spain|Madrid|Europe|Spanish;Catalan|euro
Sri Lanka|Colombo;Sri Jayawardenepura Kotte|Asia|Sinhala;Tamil;English|rupee
Sudan|Khartoum|Africa|Arabic;English|pound
Suriname|Paramaribo|South America|Dutch|dollar
Sweden|Stockholm|Europe|Swedish;Finnish|krona;króna
Switzerland|Bern|Europe|German;French;Italian|franc
Syria|Damascus|Asia|Arabic;Kurdish|pound
Taiwan|Taipei|Asia|Mandarin;Chinese|dollar
Tajikistan|Dushanbe|Asia|Tajik;Persian;Russian|somoni
Tanzania|Dodoma;Dar es Salaam|Africa|Swahili;English|shilling
Thailand|Bangkok|Asia|Thai|baht
Togo|Lomé|Africa|French|franc
Tonga|Nukuʻalofa|Oceania|Tongan;English|paʻanga
Trinidad and Tobago|Port of Spain|North America;South America|English|dollar
Tunisia|Tunis|Africa|Arabic;French|dinar
Turkey|Ankara|Asia;Europe|Turkish;Kurdish|lira
Turkmenistan|Ashgabat|Asia|Turkmen;Russian|manat
Uganda|Kampala|Africa|English;Swahili|shilling
Ukraine|Kyiv|Europe|Ukrainian;Russian|hryvnia
the United Arab Emirates|Abu Dhabi|Asia|Arabic|dirham
the United Kingdom|London|Europe|English|pound
the United States|Washington, D.C.|North America|English;Spanish|dollar
Uruguay|Montevideo|South America|Spanish|peso
Uzbekistan|Tashkent|Asia|Uzbek;Russian|som
Vanuatu|Port Vila|Oceania|Bislama;English;French|vatu
Venezuela|Caracas|South America|Spanish|bolívar
Vietnam|Hanoi|Asia|Vietnamese|dong
Yemen|Sanaa;Aden|Asia|Arabic|rial
Zambia|Lusaka|Africa|English|kwacha
Zimbabwe|Harare|Africa|English;Shona|-
"""
