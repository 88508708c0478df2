"""``xchmv2 demo``: the whole job on a synthetic forest."""

from __future__ import annotations

import click


@click.command()
@click.argument("output_dir", default=".", type=click.Path(file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), show_default="10", help="Seed of the forest.")
@click.option(
    "--size",
    type=click.IntRange(min=64),
    show_default="640",
    help="Side of the scene [px of 0.6 m].",
)
@click.option("--overwrite", is_flag=True, help="Replace a demo.zarr and a demo.png.")
@click.option("--model", default="demo", hidden=True)
def demo(output_dir: str, seed: int | None, size: int | None, overwrite: bool, model: str) -> None:
    """Do the whole job on a synthetic forest.

    Needs no network and a minute or two. Writes demo.zarr (imagery, truth and prediction) and
    demo.png (look at it) into OUTPUT_DIR, by default the current folder, and prints how near the
    prediction comes to the truth.
    """
    from xchmv2.demo.run import SEED, SIZE, run_demonstration

    found = run_demonstration(
        output_dir,
        seed=SEED if seed is None else seed,
        size=SIZE if size is None else size,
        overwrite=overwrite,
        model=model,
        report=lambda line: click.echo(f"{line} ..."),
    )
    click.echo(f"\n{found.tables}\n\nLook at {found.picture}. Then try:\n\n{found.next_steps}")
