"""A product table in, the same table with an image of every product out. Copy it, and change what differs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flux_prefect import BatchFailed, ImageBucket, publish_batch
from flux_prefect.manifest.joining import join_images, read_parquet_table, write_parquet_table
from flux_prefect.tables.prompts import render_prompts, write_rows

read_products = task(name="read-products", cache_policy=NO_CACHE, persist_result=False)(read_parquet_table)
write_catalogue = task(name="write-catalogue", cache_policy=NO_CACHE, persist_result=False)(write_parquet_table)


@flow
async def products_to_catalogue(
    products: str,
    bucket: str,
    template: str = "a studio photograph of {{ name }}, soft light, plain background",
    id_column: str = "id",
    catalogue: str = "catalogue/products.parquet",
    credentials: str | None = None,
    max_credits: float | None = None,
) -> str:
    """Publish an image of every product, then the table with a column for what became of each.

    A product keeps its image as long as its prompt stays the same: a nightly run pays for new and changed products
    alone. The catalogue is written whether or not all images are there.

    Args:
        products: A Parquet file (s3://…, https://… or a path), a row a product.
        bucket: s3://name/prefix, or the name of a saved Image Bucket block.
        template: The prompt, in Jinja2; its variables are the table's columns.
        id_column: The column that identifies each product.
        catalogue: Where the joined table goes, below the bucket's prefix.
        credentials: The name of a saved AIMLAPI Credentials block. Empty: AIMLAPI_KEY of the environment.
        max_credits: A hard cap on what this run spends, in credits.

    Returns:
        The s3:// address of the catalogue.
    """
    destination = await ImageBucket.resolve(bucket)
    table = await read_products(products, destination)
    failed: BatchFailed | None = None
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "products.jsonl")
        write_rows(render_prompts(table.to_pylist(), template, id_column=id_column, aspect_ratio="1:1"), prompts)
        try:
            report = await publish_batch(str(prompts), bucket, credentials, max_credits=max_credits)
        except BatchFailed as error:
            report, failed = error.report, error
    uri = await write_catalogue(join_images(table, report.read(), id_column), destination, catalogue)
    if failed is not None:
        raise failed
    return uri
