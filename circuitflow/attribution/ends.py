"""The nodes at the two ends of edges, and what every downstream node passes on of the metric's gradient."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.changes import Changes, differing
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.sparse import products
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.dictionary import Dictionary


@dataclass(frozen=True)
class End:
    """One end of edges: a site, its dictionary and the nodes that stand alone in the table of edges.

    ``feature`` is a feature's number or ERROR, ``position`` a token position or :data:`SUMMED`; a site has nodes of one
    of the two kinds.
    """

    site: str
    dictionary: Dictionary
    feature: Int64[Tensor, " nodes"]
    position: Int64[Tensor, " nodes"]

    def __len__(self) -> int:
        return len(self.feature)

    @property
    def summed(self) -> bool:
        """Whether nodes stand for all positions together."""
        return bool((self.position == SUMMED).all())

    @property
    def features(self) -> Int64[Tensor, " features"]:
        """The different features among the nodes, ascending."""
        return self.feature[self.feature != ERROR].unique()

    @property
    def column(self) -> Int64[Tensor, " nodes"]:
        """For each node the place of its feature in ``features``; the error comes after the last."""
        column = torch.searchsorted(self.features, self.feature)
        return torch.where(self.feature == ERROR, len(self.features), column)


@dataclass(frozen=True)
class Targets:
    """∂m/∂(downstream node) · ∂(node)/∂y, at the ``n`` tokens of a batch that can differ.

    Columns of ``values``: one per feature of the end; rows of ``directions`` their encoder rows. The cotangent of a
    feature at a token is value · direction, that of the error and of the rest (all other features together) a vector.
    """

    pair: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    end: End
    values: Float[Tensor, "n features"]
    """∂m/∂f = g·W_dec[f] where the feature is active, else 0."""
    directions: Float[Tensor, "features d_model"]
    error: Float[Tensor, "n d_model"]
    rest: Float[Tensor, "n d_model"]

    def present(self) -> Int64[Tensor, " nodes"]:
        """Numbers of the nodes whose cotangent is not zero throughout the batch; the rest is number ``len(end)``."""
        return self._passing().any(0).nonzero()[:, 0]

    def shared(self, by_token: bool) -> Int64[Tensor, "rows n"]:
        """Nodes that can be pulled back at once, since pairs do not mix: in each row a node for every token, or −1.

        A node's tokens in a pair are in one row: as many rows as the pair with the most nodes has.

        :param by_token: tokens do not mix either: as many rows as the token with the most nodes has.
        """
        passing = self._passing()
        if by_token:
            group = torch.arange(len(passing), device=passing.device)
            here = passing
        else:
            group = self.pair
            counts = torch.zeros(int(group.max()) + 1, passing.shape[1], device=passing.device)
            here = counts.index_add_(0, group, passing.to(counts.dtype)) > 0
        place, node = here.nonzero(as_tuple=True)
        rows = torch.full((int(here.sum(1).max()), len(here)), -1, device=node.device)
        rows[here.cumsum(1)[place, node] - 1, place] = node
        return rows[:, group]

    def _passing(self) -> Bool[Tensor, "n nodes"]:
        """Where each node, and the rest, passes anything on."""
        here = torch.cat([self.values != 0, self.error.any(1, keepdim=True)], dim=1)[:, self.end.column]
        if not self.end.summed:
            here = here & (self.position[:, None] == self.end.position)
        return torch.cat([here, self.rest.any(1, keepdim=True)], dim=1)

    def cotangents(
        self, nodes: Int64[Tensor, " m"] | Int64[Tensor, "m n"], like: Tensor
    ) -> Float[Tensor, "m batch pos d_model"]:
        """Cotangents at the downstream site, shaped ``like`` its value; zero at all other tokens.

        :param nodes: one for all tokens, or one for each as in :meth:`shared`.
        """
        features, end = len(self.directions), self.end
        node = nodes.view(len(nodes), -1).expand(-1, len(self.pair))  # −1 is the last of the lists
        column = torch.cat([end.column, end.column.new_tensor([features + 1, features + 2])])[node]
        place = torch.cat([end.position, end.position.new_full((2,), SUMMED)])[node]
        there = (place == SUMMED) | (place == self.position)
        values = (
            torch.nn.functional.pad(self.values, (0, 3))[
                torch.arange(len(self.pair), device=column.device), column
            ]
            * there
        )
        directions = torch.nn.functional.pad(self.directions, (0, 0, 0, 1))
        rows = values[..., None] * directions[column.clamp(max=features)]
        for number, vectors in ((features, self.error), (features + 1, self.rest)):
            row, token = ((column == number) & there).nonzero(as_tuple=True)
            rows[row, token] = vectors[token]
        full = like.new_zeros(len(nodes), *like.shape)
        full[:, self.pair, self.position] = rows.to(like.dtype)
        return full


def targets_of(down: End, cached: Cached, pairs: TokenPairs, positions: str = "sum") -> Targets:
    """What every downstream node passes on of the metric's gradient g; over all nodes this sums to g.

    A feature passes (g·W_dec[f])·W_enc[f] where it is active: there the encoder is linear. The error is y − ŷ(y), so
    it passes what all features leave of g.
    """
    pair, position = differing(pairs, positions).nonzero(as_tuple=True)
    gradient = cached.gradient[pair, position]
    dictionary = down.dictionary
    codes = dictionary.encode(cached.base[pair, position], position)
    assert dictionary.W_enc is not None  # encode() has refused it otherwise
    passed = codes.with_values(products(codes, gradient, dictionary.W_dec))
    return Targets(
        pair=pair,
        position=position,
        end=down,
        values=passed.columns(down.features),
        directions=dictionary.W_enc[down.features],
        error=gradient - decode_codes(passed, dictionary.W_enc),
        rest=decode_codes(passed.where(~_among(passed, position, down)), dictionary.W_enc),
    )


def _among(codes: Codes, position: Int64[Tensor, " n"], end: End) -> Tensor:
    """Which entries belong to a node of the end."""
    if end.summed:
        return torch.isin(codes.features, end.features)
    width = codes.d_dict
    nodes = end.position * width + end.feature
    return torch.isin(position[codes.rows()] * width + codes.features, nodes[end.feature != ERROR])


@dataclass(frozen=True)
class Sources:
    """The changes of the upstream nodes, patched − clean, at the ``n`` tokens of a batch that can differ."""

    pair: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    end: End
    values: Float[Tensor, "n features"]
    """f_p − f_c."""
    directions: Float[Tensor, "features d_model"]
    """Decoder rows."""
    error: Float[Tensor, "n d_model"]
    """ε_p − ε_c."""

    def rows(self, node: int) -> Float[Tensor, "n d_model"]:
        """What patching one node adds to the vector of each token."""
        column, position = int(self.end.column[node]), int(self.end.position[node])
        is_error = column == len(self.directions)
        rows = self.error if is_error else self.values[:, column, None] * self.directions[column]
        return rows if position == SUMMED else rows * (self.position == position)[:, None]

    def effects(self, gradient: Float[Tensor, "m batch pos d_model"]) -> Float[Tensor, "batch nodes m"]:
        """gradient · change of every node, summed over the node's tokens; float64."""
        return self.by_node(self._each(gradient), gradient.shape[1:3])

    def effects_through(
        self, gradient: Float[Tensor, "m batch pos d_model"], nodes: Int64[Tensor, "m n"], columns: int
    ) -> Float[Tensor, "batch nodes columns"]:
        """The same where each row of the gradient belongs to several downstream nodes, one for every token.

        :param nodes: numbers below ``columns``, −1 where there is none.
        """
        each, batch, end = self._each(gradient), gradient.shape[1], self.end
        found = each.new_zeros(batch, len(end), columns)
        into = self.pair * (columns + 1) + torch.where(nodes < 0, columns, nodes)
        for place in end.position.unique().tolist():
            here = slice(None) if place == SUMMED else self.position == place
            total = each.new_zeros(batch * (columns + 1), each.shape[1])
            total.index_add_(0, into[:, here].flatten(), each[here].permute(2, 0, 1).flatten(0, 1))
            ups = end.position == place
            total = total.view(batch, columns + 1, -1)[:, :columns, end.column[ups]]
            found[:, ups] = total.transpose(1, 2)
        return found

    def _each(self, gradient: Float[Tensor, "m batch pos d_model"]) -> Float[Tensor, "n columns m"]:
        """gradient · change of every feature, and of the error, at each token."""
        here = gradient[:, self.pair, self.position].to(self.directions.dtype)  # (m, n, d_model)
        features = torch.matmul(here, self.directions.T) * self.values
        error = torch.einsum("mnd,nd->mn", here, self.error)
        return torch.cat([features, error[..., None]], dim=2).permute(1, 2, 0).double()

    def by_node(
        self, each: Float[Tensor, "n columns m"], shape: tuple[int, ...] | torch.Size
    ) -> Float[Tensor, "batch nodes m"]:
        """Sum what every token's columns (features, then the error) have over the tokens of each node."""
        batch, pos = shape
        end = self.end
        if end.summed:
            total = each.new_zeros(batch, *each.shape[1:]).index_add_(0, self.pair, each)
            return total[:, end.column]
        grid = each.new_zeros(batch, pos, *each.shape[1:])
        grid[self.pair, self.position] = each
        there = end.position < pos
        found = grid[:, end.position.clamp(max=pos - 1), end.column]
        return found * there[None, :, None]


def sources_of(up: End, changes: Changes) -> Sources:
    """The end's part of the changes of its site."""
    return Sources(
        changes.pair,
        changes.position,
        up,
        changes.features.columns(up.features),
        up.dictionary.W_dec[up.features],
        changes.error(up.dictionary.W_dec),
    )
