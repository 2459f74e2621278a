"""The classes of COCO and COCO-Stuff: names, ids and super-categories.

Ids and names are those of COCO-Stuff's label list (Caesar et al., CVPR 2018; 1–91 things, of which
11 never occur, 92–182 stuff), super-categories those of the official stuff annotations
(`stuff_val2017.json`) and of COCO's own list. Pixel maps hold id − 1, and 255 where unlabelled. The
order of the 27 super-categories is the one of IIC (Ji et al., ICCV 2019), which PiCIE, STEGO and
others kept.
"""

import numpy as np
from numpy.typing import NDArray

UNLABELLED = 255  # in pixel maps and in labels
BACKGROUND = "background"

SUPER_CATEGORIES = {
    "electronic": "72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone",
    "appliance": "78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 83 blender",
    "food-thing": (
        "52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, "
        "59 pizza, 60 donut, 61 cake"
    ),
    "furniture-thing": (
        "62 chair, 63 couch, 64 potted plant, 65 bed, 66 mirror, 67 dining table, 68 window, "
        "69 desk, 70 toilet, 71 door"
    ),
    "indoor": (
        "84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush, "
        "91 hair brush"
    ),
    "kitchen": "44 bottle, 45 plate, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl",
    "accessory": (
        "26 hat, 27 backpack, 28 umbrella, 29 shoe, 30 eye glasses, 31 handbag, 32 tie, 33 suitcase"
    ),
    "animal": (
        "16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, "
        "25 giraffe"
    ),
    "outdoor": (
        "10 traffic light, 11 fire hydrant, 12 street sign, 13 stop sign, 14 parking meter, "
        "15 bench"
    ),
    "person": "1 person",
    "sports": (
        "34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, "
        "40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket"
    ),
    "vehicle": "2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat",
    "ceiling": "102 ceiling-other, 103 ceiling-tile",
    "floor": (
        "101 carpet, 114 floor-marble, 115 floor-other, 116 floor-stone, 117 floor-tile, "
        "118 floor-wood"
    ),
    "food-stuff": "121 food-other, 122 fruit, 153 salad, 170 vegetable",
    "furniture-stuff": (
        "98 cabinet, 107 counter, 108 cupboard, 110 desk-stuff, 112 door-stuff, "
        "123 furniture-other, 130 light, 133 mirror-stuff, 156 shelf, 161 stairs, 165 table"
    ),
    "raw-material": "100 cardboard, 132 metal, 139 paper, 143 plastic",
    "textile": (
        "92 banner, 93 blanket, 104 cloth, 105 clothes, 109 curtain, 131 mat, 137 napkin, "
        "141 pillow, 152 rug, 167 textile-other, 168 towel"
    ),
    "wall": (
        "171 wall-brick, 172 wall-concrete, 173 wall-other, 174 wall-panel, 175 wall-stone, "
        "176 wall-tile, 177 wall-wood"
    ),
    "window": "180 window-blind, 181 window-other",
    "building": "95 bridge, 96 building-other, 128 house, 151 roof, 158 skyscraper, 166 tent",
    "ground": (
        "111 dirt, 125 gravel, 126 ground-other, 136 mud, 140 pavement, 144 platform, "
        "145 playingfield, 147 railroad, 149 road, 154 sand, 159 snow"
    ),
    "plant": (
        "94 branch, 97 bush, 119 flower, 124 grass, 129 leaves, 134 moss, 142 plant-other, "
        "163 straw, 169 tree"
    ),
    "sky": "106 clouds, 157 sky-other",
    "solid": "127 hill, 135 mountain, 150 rock, 160 solid-other, 162 stone, 182 wood",
    "structural": "99 cage, 113 fence, 138 net, 146 railing, 164 structural-other",
    "water": "120 fog, 148 river, 155 sea, 178 water-other, 179 waterdrops",
}
ABSENT_THINGS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})  # never annotated
LAST_THING = 91

CLASSES = {
    int(number): name
    for members in SUPER_CATEGORIES.values()
    for number, _, name in (member.partition(" ") for member in members.split(", "))
}
THINGS = {
    number: CLASSES[number] for number in range(1, LAST_THING + 1) if number not in ABSENT_THINGS
}


def names_27() -> tuple[str, ...]:
    """`background`, which no pixel is, then the 27 super-categories.

    COCO-Stuff-27 has no background class, while class 0 is background everywhere else here (K-means
    uses as many clusters as there are classes besides it). So the super-categories are 1 to 27.
    """
    return (BACKGROUND, *SUPER_CATEGORIES)


def names_81() -> tuple[str, ...]:
    """`background`, then the 80 things in the order of their ids."""
    return (BACKGROUND, *THINGS.values())


def table_27() -> NDArray[np.uint8]:
    """Value of a pixel map -> class of `names_27`: uint8 [256]."""
    table = np.full(256, UNLABELLED, np.uint8)
    for place, members in enumerate(SUPER_CATEGORIES.values(), 1):
        for member in members.split(", "):
            table[int(member.partition(" ")[0]) - 1] = place
    return table


def table_81() -> NDArray[np.uint8]:
    """Value of a pixel map -> class of `names_81`: uint8 [256]; stuff is background."""
    table = np.full(256, UNLABELLED, np.uint8)
    table[LAST_THING : max(CLASSES)] = 0
    for place, number in enumerate(THINGS, 1):
        table[number - 1] = place
    return table


def thing_classes() -> dict[int, int]:
    """Category id of an instance -> class of `names_81`."""
    return {number: place for place, number in enumerate(THINGS, 1)}
