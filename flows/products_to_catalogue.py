"""Have an image of every product of a table, and the table with the images' addresses in it: an example pipeline.

Product table (Parquet in S3) → prompts → `publish_batch` as a subflow → table and manifest joined, in S3 again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import anyio.to_thread
import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from prefect import flow, task
from prefect.assets import add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import AspectRatio
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.keys import clean_prefix
from flux_prefect.display.events import find_asset
from flux_prefect.errors import BatchFailed, TableError
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, InFlight, Tolerated
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.seeds import draw_seed
from flux_prefect.tables.parquet import load_pyarrow
from flux_prefect.tables.sources import open_source

_PARQUET = "application/vnd.apache.parquet"
_COLUMNS = {
    "image_status": "string",
    "image_uri": "string",
    "image_sha256": "string",
    "image_width": "int32",
    "image_height": "int32",
    "image_seed": "int64",
    "image_error": "string",
}


class CatalogueReport(BaseModel):
    """What became of a catalogue."""

    model_config = ConfigDict(frozen=True)

    catalogue: str = Field(description="The s3:// address of the joined table.")
    batch: BatchReport = Field(description="The report of the images.")


@flow(name="products-to-catalogue", flow_run_name="catalogue of {products}")
async def products_to_catalogue(
    products: str,
    bucket: BucketChoice,
    template: str = "a studio photograph of {{ name }}, soft light, plain background",
    id_column: str = "id",
    catalogue: str = "catalogue/products.parquet",
    aspect_ratio: AspectRatio = "1:1",
    credentials: CredentialsChoice = None,
    max_in_flight: InFlight = 8,
    max_failed: Tolerated = 0,
    max_credits: CreditCap = None,
) -> CatalogueReport:
    """Have an image of every product in a bucket, and beside them the product table with a column for what came of it.

    A product keeps its image as long as what its prompt says of it stays: seeds follow from the ids, so a nightly run
    pays for new and changed products alone. The table is written whether or not all images are there; `image_status`
    tells of each. For tables that fit into memory.

    Args:
        products: A Parquet file (s3://…, https://… or a path), a row a product.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name. Images and catalogue go there.
        template: The prompt, in Jinja2; its variables are the table's columns.
        id_column: The column that tells products apart.
        catalogue: Where the joined table goes, below the bucket's prefix.
        aspect_ratio: Width to height of all images.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.
        max_in_flight: Most paid calls at once.
        max_failed: How many products may end without their images before the run counts as Failed.
        max_credits: A hard cap on what this run spends, in credits (2,000,000 to the US dollar).

    Returns:
        Where the catalogue is, and the report of the images.

    Raises:
        TableError: the table can't be read, its ids don't tell products apart, or a product lacks what the template
            asks for. Nothing was sent.
        BatchFailed: more than max_failed products are without their images. The catalogue is written all the same.
    """
    destination = await ImageBucket.resolve(bucket)
    uri = f"{destination.uri}/{clean_prefix(catalogue)}"
    write = materialize(
        uri,
        by="flux_prefect",
        name="write-catalogue",
        asset_deps=[found for found in map(find_asset, (products, destination.uri)) if found is not None],
        cache_policy=NO_CACHE,
        persist_result=False,
    )(_write_catalogue)
    table = await read_products(products, destination)
    with tempfile.TemporaryDirectory(prefix="flux-products-") as folder:
        prompts = Path(folder, "prompts.jsonl")  # a file, as a run's parameters may not be large
        make_prompts(table, template, id_column, aspect_ratio, prompts)
        state: State[Any] = await publish_batch(
            str(prompts),
            bucket,
            credentials,
            max_in_flight=max_in_flight,
            max_failed=max_failed,
            max_credits=max_credits,
            return_state=True,
        )
    result = await state.aresult(raise_on_failure=False)
    report = result.report if isinstance(result, BatchFailed) else result
    if isinstance(report, BatchReport):
        await write(table, report, id_column, destination, catalogue)
        if report is result:
            result = CatalogueReport(catalogue=uri, batch=report)
    # As the subrun's, so that this run's page shows its summary; whoever calls the flow gets what is inside.
    return cast("CatalogueReport", State(type=state.type, name=state.name, message=state.message, data=result))


@task(cache_policy=NO_CACHE, persist_result=False)
async def read_products(source: str, bucket: ImageBucket) -> Any:
    """The product table, as pyarrow has it. Keys and endpoint of the bucket serve for a table in the same bucket.

    Raises:
        TableError: it can't be read, or is no Parquet.
    """
    pyarrow, parquet = load_pyarrow()
    async with open_source(source, bucket=bucket) as fetched:
        try:
            with fetched.open() as file:
                return await anyio.to_thread.run_sync(parquet.read_table, file)
        except (pyarrow.ArrowException, OSError) as error:
            raise TableError(f"{fetched.name} is not a Parquet file, or is broken ({error}).") from error


@task(cache_policy=NO_CACHE, persist_result=False)
def make_prompts(table: Any, template: str, id_column: str, aspect_ratio: AspectRatio, target: Path) -> int:
    """Write a row for `publish_batch` for each product; returns how many. All are rendered before any is paid for.

    Raises:
        TableError: an id is missing or there twice, or a product lacks what the template asks for.
    """
    if id_column not in table.column_names:
        raise TableError(f"id_column {id_column!r} is no column of the table: it has {', '.join(table.column_names)}.")
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TableError(f"template is broken: {error.message}.") from error
    known: set[str] = set()
    with target.open("w", encoding="utf-8") as file:
        for number, product in enumerate(table.to_pylist(), start=1):
            product_id = _id_of(product[id_column])
            if not product_id or product_id in known:
                raise TableError(f"Product {number} has no {id_column} of its own: {product_id!r}.")
            known.add(product_id)
            try:
                prompt = compiled.render(product)
            except Exception as error:  # a template can raise whatever its expressions do
                raise TableError(f"Product {number} ({product_id}) can't be rendered: {error}.") from error
            row = {"id": product_id, "prompt": prompt, "seed": draw_seed("products", product_id)}
            file.write(json.dumps({**row, "aspect_ratio": aspect_ratio}, ensure_ascii=False) + "\n")
    return len(known)


async def _write_catalogue(
    table: Any, report: BatchReport, id_column: str, bucket: ImageBucket, catalogue: str
) -> dict[str, int]:
    """Write the table with the columns `image_…`, replacing those of an earlier catalogue; returns the counts.

    Raises:
        BucketError: the bucket did not take it.
    """
    with tempfile.TemporaryFile() as file:
        await anyio.to_thread.run_sync(_join, table, report, id_column, file)
        file.seek(0)
        await bucket.put_file(catalogue, file, content_type=_PARQUET, cache_control="no-cache")
    add_asset_metadata(
        f"{bucket.uri}/{clean_prefix(catalogue)}",
        {"products": table.num_rows, "counts": report.counts, "manifest": report.manifest},
    )
    return {str(status): number for status, number in report.counts.items()}


def _join(table: Any, report: BatchReport, id_column: str, file: BinaryIO) -> None:
    pyarrow, parquet = load_pyarrow()
    outcomes = {record.id: _tell(record) for record in report.read()}
    products = [outcomes.get(_id_of(value), {}) for value in table.column(id_column).to_pylist()]
    table = table.drop_columns([name for name in table.column_names if name in _COLUMNS])
    for name, kind in _COLUMNS.items():
        values = pyarrow.array([product.get(name) for product in products], type=getattr(pyarrow, kind)())
        table = table.append_column(name, values)
    parquet.write_table(table, file)


def _id_of(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _tell(record: ItemRecord) -> dict[str, Any]:
    told: dict[str, Any] = {"image_status": record.status, "image_error": record.message}
    if record.images:
        image = record.images[0]
        told |= {f"image_{name}": getattr(image, name) for name in ("uri", "sha256", "width", "height", "seed")}
    return told
