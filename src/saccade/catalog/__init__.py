"""What there is: cards of the registered mechanisms, and the papers they come from."""

from saccade.catalog.card import CAPABILITIES, ROOMS, Budget, Card, cards, get, register, search
from saccade.catalog.papers import Paper, papers

__all__ = ["CAPABILITIES", "ROOMS", "Budget", "Card", "Paper", "cards", "get", "papers", "register", "search"]
