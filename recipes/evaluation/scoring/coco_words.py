# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Words for the 80 objects of COCO, for CHAIR; ours. Plurals are found by their singulars.

CHAIR's own list is `synonyms.txt` of its repository, in the same form; figures by another list differ a little.
"""

COCO_WORDS = """
person, man, woman, boy, girl, child, kid, baby, toddler, guy, lady, gentleman, people, adult, teenager
person, player, batter, pitcher, catcher, skier, snowboarder, skateboarder, skater, surfer, rider, biker
person, cyclist, pedestrian, worker, officer, policeman, soldier, chef, cook, driver, student, passenger
person, mother, father, bride, groom, couple, crowd
bicycle, bike, pedal bike
car, automobile, sedan, taxi, cab, suv, minivan, hatchback
motorcycle, motorbike, scooter, moped, motor bike, motor cycle
airplane, plane, jet, aircraft, jetliner, airliner, air plane
bus, minibus, double decker
train, locomotive, subway train, tram, train car
truck, pickup, lorry, fire engine, firetruck, fire truck, tow truck, pick up truck
boat, ship, sailboat, ferry, canoe, kayak, yacht, rowboat, raft
traffic light, stoplight, stop light, traffic signal, street light
fire hydrant, hydrant
stop sign
parking meter
bench, park bench
bird, duck, goose, seagull, gull, pigeon, parrot, owl, swan, ostrich, eagle, penguin, chicken, flamingo
cat, kitten, kitty
dog, puppy, pup, poodle, bulldog, terrier
horse, pony, foal, stallion, colt
sheep, lamb, ram, ewe
cow, bull, calf, ox, cattle, steer
elephant
bear, polar bear, grizzly, bear cub
zebra
giraffe
backpack, rucksack, knapsack
umbrella, parasol
handbag, purse, hand bag, tote bag
tie, necktie, bow tie
suitcase, luggage, suit case, briefcase
frisbee, flying disc
skis, ski
snowboard, snow board
sports ball, ball, baseball, basketball, football, soccer ball, tennis ball, volleyball
kite
baseball bat, bat
baseball glove, catcher's mitt, mitt
skateboard, skate board
surfboard, surf board, boogie board
tennis racket, racket, racquet, tennis racquet
bottle, beer bottle, wine bottle, water bottle
wine glass, goblet
cup, mug, teacup, coffee cup
fork
knife, pocket knife
spoon, teaspoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger, panini, sub
orange, tangerine, clementine
broccoli
carrot
hot dog, hotdog, corn dog
pizza, pizza pie
donut, doughnut
cake, cupcake, cheesecake, birthday cake, wedding cake
chair, armchair, stool, recliner, arm chair, high chair
couch, sofa, loveseat, love seat
potted plant, houseplant, house plant
bed, bunk bed
dining table, table, desk, kitchen table, coffee table
toilet, urinal, commode
tv, television, monitor, tv set, television set
laptop, notebook computer, laptop computer
mouse, computer mouse
remote, remote control, controller, wii remote
keyboard, computer keyboard
cell phone, mobile phone, phone, cellphone, smartphone, telephone
microwave, microwave oven
oven, stove, stove top oven
toaster
sink, washbasin, basin
refrigerator, fridge, freezer
book, textbook, notebook, magazine
clock, alarm clock, clock tower, wall clock
vase
scissors, shears
teddy bear, teddy
hair drier, hair dryer, hairdryer, blow dryer
toothbrush, tooth brush
"""
