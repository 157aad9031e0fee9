"""Kinds of products of the generated shop: what they are called, cost, can be and come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from env_servers.webshop.generator_phrases import ATTRIBUTES, AXES, Attribute, Axis


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of product."""

    category: str
    """The coarse category, such as `kitchen`."""
    name: str
    """As it stands in titles and instructions, in lower case."""
    query: str
    """The search that leads to this kind: its plural."""
    path: str
    """Path of categories, with a single right-pointing angle quotation mark between them."""
    dollars: tuple[int, int]
    """Lowest and highest price."""
    materials: tuple[Attribute, ...]
    """A product has one of them at most."""
    features: tuple[Attribute, ...]
    axes: tuple[Axis, ...]

    @property
    def is_plural(self) -> bool:
        """Whether the name is a plural, such as `sandals`."""
        return self.name == self.query


def _kind(
    category: str, path: str, name: str, low: int, high: int, *lists: str, query: str = ""
) -> Kind:
    materials, features, axes = (tuple(filter(None, text.split(", "))) for text in lists)
    query = query or f"{name}s"
    return Kind(
        category=category,
        name=name,
        query=query,
        path=f"{path} > {query.title()}".replace(">", "\u203a"),
        dollars=(low, high),
        materials=tuple(ATTRIBUTES[phrase] for phrase in materials),
        features=tuple(ATTRIBUTES[phrase] for phrase in features),
        axes=tuple(AXES[axis] for axis in axes),
    )


_KITCHEN: Final = (
    _kind("kitchen", "Home & Kitchen > Cookware", "frying pan", 15, 120,
        "stainless steel, cast iron, ceramic coating",
        "non stick, oven safe, dishwasher safe, heat resistant, heavy duty, soft grip, "
        "small kitchens, camping trips",
        "inches, color, style",
    ),
    _kind("kitchen", "Home & Kitchen > Tea & Coffee", "tea kettle", 18, 90,
        "stainless steel, tempered glass, cast iron",
        "long lasting, easy clean, heat resistant, bpa free, double wall, soft grip, "
        "led display, small kitchens",
        "color, ounces, style",
    ),
    _kind("kitchen", "Home & Kitchen > Cutlery", "knife set", 20, 150,
        "stainless steel, bamboo wood",
        "dishwasher safe, rust proof, soft grip, hand made, space saving, long lasting, "
        "carrying case, small kitchens, camping trips",
        "pieces, color, style",
    ),
    _kind("kitchen", "Home & Kitchen > Cutlery", "cutting board", 10, 60,
        "bamboo wood, tempered glass, recycled plastic",
        "dishwasher safe, non stick, space saving, bpa free, heavy duty, easy clean, "
        "rounded edges, small kitchens, camping trips",
        "inches, color, pack",
    ),
    _kind("kitchen", "Home & Kitchen > Storage", "lunch box", 9, 45,
        "stainless steel, bamboo wood, recycled plastic",
        "leak proof, bpa free, dishwasher safe, easy clean, light weight, soft grip, "
        "double wall, office lunches, school lunches",
        "color, ounces, style", query="lunch boxes",
    ),
    _kind("kitchen", "Home & Kitchen > Storage", "water bottle", 9, 50,
        "stainless steel, tempered glass, recycled plastic",
        "leak proof, bpa free, dishwasher safe, light weight, easy clean, double wall, "
        "soft grip, gym workout, camping trips",
        "color, ounces, pack",
    ),
)  # fmt: skip
_GARDEN: Final = (
    _kind("garden", "Garden & Outdoor > Watering", "garden hose", 15, 110,
        "natural rubber, solid brass, recycled plastic",
        "heavy duty, leak proof, rust proof, light weight, winter proof, quick release, "
        "raised beds, small balconies",
        "feet, color",
    ),
    _kind("garden", "Garden & Outdoor > Planting", "plant pot", 8, 70,
        "bamboo wood, recycled plastic, cast iron",
        "winter proof, weather resistant, light weight, hand made, eye catching, drain holes, "
        "small balconies, patio parties",
        "inches, color, pack",
    ),
    _kind("garden", "Garden & Outdoor > Hand Tools", "pruning shears", 10, 65,
        "stainless steel, solid brass",
        "rust proof, heavy duty, light weight, easy clean, quick release, soft grip, "
        "small hands, raised beds",
        "inches, color, style", query="pruning shears",
    ),
    _kind("garden", "Garden & Outdoor > Birds", "bird feeder", 12, 80,
        "recycled plastic, tempered glass, solid brass",
        "weather resistant, rust proof, easy clean, easy assemble, eye catching, hand made, "
        "drain holes, small balconies",
        "color, style",
    ),
    _kind("garden", "Garden & Outdoor > Lighting", "solar lantern", 12, 95,
        "tempered glass, stainless steel, bamboo wood",
        "weather resistant, rust proof, easy assemble, long lasting, eye catching, "
        "motion sensor, patio parties, camping trips",
        "color, pack, style",
    ),
    _kind("garden", "Garden & Outdoor > Hand Tools", "work gloves", 7, 40,
        "natural rubber, organic cotton, vegan leather",
        "water repellent, heavy duty, machine washable, quick dry, light weight, soft grip, "
        "small hands, raised beds",
        "size, color", query="work gloves",
    ),
)  # fmt: skip
_CLOTHING: Final = (
    _kind("clothing", "Clothing > Outerwear", "rain jacket", 25, 180,
        "soft fleece, organic cotton, recycled plastic",
        "water repellent, machine washable, light weight, quick dry, loose fit, deep pockets, "
        "adjustable hood, full zip, wet trails",
        "size, color",
    ),
    _kind("clothing", "Clothing > Tops", "hoodie", 18, 90,
        "soft fleece, organic cotton, merino wool",
        "machine washable, slim fit, loose fit, quick dry, deep pockets, adjustable hood, "
        "full zip, gym workout, cold days",
        "size, color, style",
    ),
    _kind("clothing", "Clothing > Tops", "t-shirt", 8, 45,
        "organic cotton, linen blend, merino wool",
        "machine washable, slim fit, loose fit, quick dry, light weight, fair trade, "
        "gym workout, daily wear",
        "size, color, pack",
    ),
    _kind("clothing", "Clothing > Dresses", "summer dress", 20, 120,
        "organic cotton, linen blend",
        "machine washable, loose fit, slim fit, hand made, eye catching, deep pockets, "
        "elastic waist, patio parties, daily wear",
        "size, color", query="summer dresses",
    ),
    _kind("clothing", "Clothing > Sportswear", "yoga leggings", 14, 80,
        "organic cotton, recycled plastic, merino wool",
        "machine washable, quick dry, slim fit, long lasting, deep pockets, elastic waist, "
        "gym workout, daily wear",
        "size, color", query="yoga leggings",
    ),
    _kind("clothing", "Clothing > Sleepwear", "pajama set", 20, 95,
        "organic cotton, soft fleece, linen blend",
        "machine washable, loose fit, light weight, long lasting, deep pockets, "
        "elastic waist, cold days, sensitive skin",
        "size, color, style",
    ),
)  # fmt: skip
_SHOES: Final = (
    _kind("shoes", "Shoes > Sport", "running shoes", 35, 190,
        "breathable mesh, vegan leather",
        "light weight, slip resistant, wide toe, quick dry, memory foam, rubber sole, "
        "arch support, gym workout, wet trails",
        "shoe size, color, width", query="running shoes",
    ),
    _kind("shoes", "Shoes > Outdoor", "hiking boots", 45, 220,
        "real suede, vegan leather, breathable mesh",
        "water repellent, slip resistant, wide toe, light weight, memory foam, rubber sole, "
        "arch support, wet trails, cold days",
        "shoe size, color, width", query="hiking boots",
    ),
    _kind("shoes", "Shoes > Summer", "sandals", 15, 90,
        "natural rubber, real suede, vegan leather",
        "slip resistant, quick dry, light weight, hand made, memory foam, arch support, "
        "long walks, daily wear",
        "shoe size, color, style", query="sandals",
    ),
    _kind("shoes", "Shoes > Home", "slippers", 10, 60,
        "soft fleece, merino wool, real suede",
        "machine washable, slip resistant, light weight, wide toe, memory foam, rubber sole, "
        "cold days, home office",
        "shoe size, color", query="slippers",
    ),
    _kind("shoes", "Shoes > City", "ankle boots", 40, 210,
        "real suede, vegan leather",
        "water repellent, slip resistant, hand made, wide toe, full zip, rubber sole, "
        "arch support, office days, long walks",
        "shoe size, color", query="ankle boots",
    ),
    _kind("shoes", "Shoes > City", "loafers", 30, 160,
        "real suede, vegan leather, organic cotton",
        "hand made, slip resistant, light weight, long lasting, memory foam, rubber sole, "
        "arch support, office days, daily wear",
        "shoe size, color, width", query="loafers",
    ),
)  # fmt: skip
_ELECTRONICS: Final = (
    _kind("electronics", "Electronics > Audio", "wireless headphones", 25, 280,
        "aluminum shell, silicone cover",
        "noise cancelling, fast charging, long lasting, water resistant, hands free, "
        "voice control, carrying case, video calls, road trips",
        "color, style", query="wireless headphones",
    ),
    _kind("electronics", "Electronics > Power", "phone charger", 9, 60,
        "aluminum shell, braided cord",
        "fast charging, space saving, light weight, long lasting, led display, carrying case, "
        "road trips, home office",
        "plug, color, pack",
    ),
    _kind("electronics", "Electronics > Power", "charging cable", 6, 35,
        "braided cord, silicone cover",
        "fast charging, high speed, heavy duty, long lasting, light weight, led display, "
        "storage bag, road trips, home office",
        "feet, plug, color",
    ),
    _kind("electronics", "Electronics > Audio", "bluetooth speaker", 18, 220,
        "aluminum shell, bamboo wood, silicone cover",
        "water resistant, fast charging, long lasting, light weight, hands free, "
        "voice control, led display, patio parties, camping trips",
        "color, style",
    ),
    _kind("electronics", "Electronics > Computers", "computer mouse", 9, 75,
        "aluminum shell, recycled plastic, bamboo wood",
        "fast charging, long lasting, high speed, light weight, soft grip, led display, "
        "home office, small hands",
        "color, plug, style", query="computer mice",
    ),
    _kind("electronics", "Electronics > Computers", "tablet case", 10, 65,
        "vegan leather, silicone cover, recycled plastic",
        "water resistant, hands free, light weight, easy clean, heavy duty, soft grip, "
        "rounded edges, home office, road trips",
        "inches, color",
    ),
)  # fmt: skip
_BEAUTY: Final = (
    _kind("beauty", "Beauty > Hair", "shampoo", 6, 40,
        "aloe vera, coconut oil, tea tree",
        "sulfate free, paraben free, cruelty free, dermatologist tested, long lasting, "
        "vitamin e, dry hair, daily use",
        "scent, ounces, pack",
    ),
    _kind("beauty", "Beauty > Skin", "face cream", 9, 90,
        "aloe vera, shea butter, tea tree",
        "paraben free, cruelty free, fast absorbing, dermatologist tested, certified organic, "
        "vitamin e, sensitive skin, daily use",
        "ounces, scent",
    ),
    _kind("beauty", "Beauty > Skin", "body lotion", 7, 45,
        "aloe vera, shea butter, coconut oil",
        "paraben free, cruelty free, fast absorbing, dermatologist tested, long lasting, "
        "vitamin e, sensitive skin, daily use",
        "scent, ounces, pack",
    ),
    _kind("beauty", "Beauty > Makeup", "lip balm", 4, 25,
        "shea butter, coconut oil, aloe vera",
        "cruelty free, paraben free, long lasting, certified organic, fair trade, vitamin e, "
        "sensitive skin, cold days",
        "flavor, pack",
    ),
    _kind("beauty", "Beauty > Makeup", "nail polish", 5, 30,
        "",
        "quick dry, long lasting, cruelty free, non toxic, paraben free, easy clean, "
        "vitamin e, daily use, patio parties",
        "bright color, pack", query="nail polishes",
    ),
    _kind("beauty", "Beauty > Hair", "hair brush", 7, 50,
        "bamboo wood, recycled plastic, natural rubber",
        "light weight, easy clean, hand made, heat resistant, soft grip, storage bag, "
        "dry hair, small hands",
        "color, inches", query="hair brushes",
    ),
)  # fmt: skip
_TOYS: Final = (
    _kind("toys", "Toys > Building", "building blocks", 12, 95,
        "beech wood, recycled plastic, thick cardboard",
        "non toxic, battery free, easy clean, eye catching, rounded edges, storage bag, "
        "picture guide, small hands, rainy days",
        "pieces, style", query="building blocks",
    ),
    _kind("toys", "Toys > Games", "board game", 14, 70,
        "beech wood, thick cardboard",
        "screen free, long lasting, hand made, eye catching, storage bag, picture guide, "
        "family nights, rainy days, road trips",
        "style, pack",
    ),
    _kind("toys", "Toys > Soft Toys", "plush toy", 9, 60,
        "organic cotton, recycled plastic, soft fleece",
        "machine washable, non toxic, hand made, battery free, sound effects, soft plush, "
        "small hands, road trips",
        "animal, inches, color",
    ),
    _kind("toys", "Toys > Games", "jigsaw puzzle", 8, 45,
        "beech wood, thick cardboard, recycled plastic",
        "screen free, non toxic, eye catching, long lasting, storage bag, picture guide, "
        "rounded edges, family nights, rainy days",
        "pieces, animal",
    ),
    _kind("toys", "Toys > Vehicles", "toy train", 12, 110,
        "beech wood, recycled plastic",
        "battery free, non toxic, easy assemble, hand made, sound effects, rounded edges, "
        "storage bag, small hands, rainy days",
        "color, pieces",
    ),
    _kind("toys", "Toys > Crafts", "paint set", 8, 55,
        "",
        "non toxic, quick dry, easy clean, eye catching, picture guide, carrying case, "
        "small hands, rainy days, family nights",
        "pieces, pack",
    ),
)  # fmt: skip
_SNACKS: Final = (
    _kind("snacks", "Grocery > Bars", "protein bars", 9, 50,
        "",
        "gluten free, sugar free, dairy free, high protein, certified organic, whole grain, "
        "sea salt, real fruit, gym workout",
        "flavor, pack", query="protein bars",
    ),
    _kind("snacks", "Grocery > Drinks", "green tea", 5, 40,
        "",
        "sugar free, certified organic, fair trade, gluten free, real fruit, natural flavors, "
        "daily use, cold days",
        "flavor, ounces, pack",
    ),
    _kind("snacks", "Grocery > Nuts", "trail mix", 7, 45,
        "",
        "gluten free, sugar free, dairy free, low sodium, certified organic, sea salt, "
        "real fruit, natural flavors, long walks",
        "flavor, ounces", query="trail mixes",
    ),
    _kind("snacks", "Grocery > Sweets", "fruit candy", 4, 30,
        "",
        "gluten free, sugar free, dairy free, fair trade, certified organic, natural flavors, "
        "road trips, school lunches",
        "flavor, pack", query="fruit candies",
    ),
    _kind("snacks", "Grocery > Baked", "crackers", 4, 28,
        "",
        "gluten free, dairy free, low sodium, high protein, certified organic, whole grain, "
        "sea salt, school lunches, road trips",
        "flavor, ounces, pack", query="crackers",
    ),
    _kind("snacks", "Grocery > Drinks", "coffee beans", 8, 55,
        "",
        "fair trade, certified organic, sugar free, long lasting, natural flavors, office days, "
        "daily use, road trips",
        "flavor, ounces", query="coffee beans",
    ),
)  # fmt: skip

CATEGORIES: Final = {
    kinds[0].category: kinds
    for kinds in (_KITCHEN, _GARDEN, _CLOTHING, _SHOES, _ELECTRONICS, _BEAUTY, _TOYS, _SNACKS)
}
"""Category -> its kinds."""
