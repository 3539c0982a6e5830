# SPDX-License-Identifier: Apache-2.0
"""n-shot classification: classes and labels that a row makes up (Chan et al. 2022, "Data Distributional Properties
Drive Emergent In-Context Learning in Transformers", with strings of tokens in the place of images)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import listed
from hybridlm.probes.task import UNSCORED, Examples, at_power, begin, check_fits, distinct, unscored


@dataclass(frozen=True)
class NShotClassification:
    """Items of a few classes, each with its label behind it; the label is asked before it is shown.

        a b c d e  L1   f g h i j  L2   a b x d e  L1   ...
                                                L1

    A class is a string of `width` tokens, an item that string with `noise` of its tokens drawn anew; which label a
    class has is drawn for the row. Strings of two classes differ everywhere, so an item is nearest to those of its own
    class. Tokens: labels, then what items are of. Asked is the label of a class of which the row has shown an item: no
    shot says nothing.
    """

    classes: int = 4
    """Classes of a row, and labels."""
    width: int = 6
    """Tokens of an item."""
    noise: int = 1
    """Tokens of an item that are drawn anew."""
    symbols: int = 32
    """Different tokens that items are of."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("classes", "width"))
        require(self.noise >= 0, f"noise ({self.noise}) must be at least 0")
        least = 4 * self.noise + 1
        require(self.width >= least, f"width ({self.width}) must be at least {least}, 4 noise + 1")
        said = f"symbols ({self.symbols}) must be at least classes ({self.classes}), whose strings differ everywhere"
        require(self.symbols >= self.classes, said)

    @property
    def vocab_size(self) -> int:
        """Labels and symbols."""
        return self.classes + self.symbols

    @property
    def answers(self) -> np.ndarray:
        """The labels."""
        return np.arange(self.classes, dtype=np.int32)

    def check(self, length: int) -> None:
        """An item of every class, and one more without its label: then one is asked in every row."""
        least = self.classes * (self.width + 1) + self.width
        check_fits(length, least, f"classes ({self.classes}) and width ({self.width})")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `shots`: items of the class shown before, as the power of two not above it."""
        rng = begin(self, seed, step, rows, length)
        width, n = self.width, length // (self.width + 1) + 1  # the last item may be cut
        labels_BC = distinct(rng, rows, 0, self.classes, self.classes)
        of_place = [distinct(rng, rows, self.classes, self.vocab_size, self.classes) for _ in range(width)]
        class_BN = rng.integers(0, self.classes, (rows, n))
        items_BNW = np.take_along_axis(np.stack(of_place, axis=2), class_BN[..., None], axis=1)
        anew = rng.random((rows, n, width)).argsort(axis=2)[..., : self.noise]
        drawn = rng.integers(self.classes, self.vocab_size, anew.shape, dtype=np.int32)
        np.put_along_axis(items_BNW, anew, drawn, axis=2)
        label_BN1 = np.take_along_axis(labels_BC, class_BN, axis=1)[..., None]
        tokens_BT = np.concatenate([items_BNW, label_BN1], axis=2).reshape(rows, -1)[:, :length]
        is_class = class_BN[:, :, None] == np.arange(self.classes)
        before = np.take_along_axis(is_class.cumsum(axis=1), class_BN[..., None], axis=2)[..., 0] - 1
        targets_BT, shots_BT = unscored(rows, n * (width + 1)), np.zeros((rows, n * (width + 1)), np.int32)
        targets_BT[:, width - 1 :: width + 1] = np.where(before > 0, label_BN1[..., 0], UNSCORED)
        shots_BT[:, width - 1 :: width + 1] = at_power(np.maximum(before, 1))
        return Examples(tokens_BT, targets_BT[:, :length], {"shots": shots_BT[:, :length]})

    def chance(self, length: int) -> float:
        """1 / classes."""
        return 1 / self.classes

    def fixed_state(self, length: int, bits: float) -> float:
        """min(1, 2 ** bits / classes): a class has any of the labels, and the state leads to at most 2 ** bits."""
        return listed(bits, self.classes)
