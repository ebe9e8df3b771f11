"""A picture of a block layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from saccade.types.layout import BlockLayout


def plot_layout(layout: BlockLayout, batch: int, head: int, path: str | None, size: int) -> Any:
    """See `BlockLayout.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'saccade[report]'") from error
    if not 0 <= batch < layout.batch or not 0 <= head < layout.heads:
        raise ValueError(f"batch={batch}, head={head}: expected within {layout.batch} x {layout.heads}")
    picture = coverage(layout, batch, head, size)
    figure = Figure(figsize=(4, 4), layout="tight")
    axes = figure.add_subplot()
    axes.imshow(picture.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0, layout.keys, layout.queries, 0))
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"{layout.density_per_head()[batch, head]:.1%} kept")
    if path is not None:
        figure.savefig(path)
    return figure


def coverage(layout: BlockLayout, batch: int, head: int, size: int) -> torch.Tensor:
    """Share of kept pairs in each cell of a picture at most `size` cells a side, fp32 on the CPU."""
    group = batch * layout.heads + head
    first, last = group * layout.query_blocks, (group + 1) * layout.query_blocks
    start, stop = int(layout.indptr[first]), int(layout.indptr[last])
    row = layout.rows[start:stop].cpu() - first
    column = layout.indices[start:stop].long().cpu()
    height, width = min(size, layout.query_blocks), min(size, layout.key_blocks)
    kept = torch.zeros(height, width)
    area = torch.zeros(height, width)
    weights = _block_shares(layout, start, stop)
    cell_row, cell_column = row * height // layout.query_blocks, column * width // layout.key_blocks
    kept.index_put_((cell_row, cell_column), weights, accumulate=True)
    rows_per_cell = torch.bincount(torch.arange(layout.query_blocks) * height // layout.query_blocks)
    columns_per_cell = torch.bincount(torch.arange(layout.key_blocks) * width // layout.key_blocks)
    area += rows_per_cell[:, None] * columns_per_cell
    return kept / area.clamp(min=1)


def _block_shares(layout: BlockLayout, start: int, stop: int) -> torch.Tensor:
    """Share of each entry's block that is kept."""
    from saccade.types.bits import bit_counts

    kinds = layout.kinds[start:stop]
    share = bit_counts(layout.bits).float() / (layout.block[0] * layout.block[1])
    if not len(share):
        return torch.ones(stop - start)
    return torch.where(kinds >= 0, share[kinds.clamp(min=0).long()], 1.0).cpu()
