"""The command does the whole job on a table of image files, and its report shows the images."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")

from typer.testing import CliRunner  # noqa: E402

import energyreg as er  # noqa: E402
from energyreg.cli.app import app  # noqa: E402
from energyreg.estimators.image import load_estimator  # noqa: E402
from energyreg.evaluation import compare  # noqa: E402
from energyreg.models import checkpoint  # noqa: E402
from energyreg.reports import page as report  # noqa: E402
from energyreg.reports import row_sections, table_report  # noqa: E402

COUNT = 40
TINY = ["--epochs", "1", "--members", "1", "--threads", "1", "--image-size", "32", "--backbone", "timm:test_resnet"]
TINY += ["--weights", "none", "--target-kind", "interval:0,120"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def line_of(result, status=2):
    """What a failure says, which is one line."""
    assert result.exit_code == status, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith(("Training", "Features"))]
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes in a folder below that of their table."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "faces").mkdir()
    rng = np.random.default_rng(0)
    ages = rng.uniform(10, 90, COUNT).round(2)
    names = [f"faces/{i:03} & <b>.png" for i in range(COUNT)]
    for name, age in zip(names, ages, strict=True):
        pixels = np.clip(2 * age + rng.normal(0, 10, (20, 300 if name == names[0] else 16, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    pd.DataFrame({"file": names, "age": ages, "note": "x"}).to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def fit_result(folder, data):
    return succeed("fit", data, "--image", "file", "-t", "age", "-o", folder / "model", *TINY, "--json")


@pytest.fixture(scope="module")
def model(folder, fit_result):
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def frame(folder, data):
    frame = pd.read_csv(data)
    return frame.assign(file=[str(folder / name) for name in frame["file"]])


# ---------------------------------------------------------------------------------------------- the whole path


def test_fit_writes_an_estimator_of_images(fit_result, model, data, frame):
    told = json.loads(fit_result.stdout)
    assert told["model"] == str(model) and told["rows"] == COUNT and told["targets"] == ["age"]
    regressor = er.ImageRegressor.load(model)
    assert (regressor.image, regressor.image_size, regressor.backbone) == ("file", 32, "timm:test_resnet")
    settings = {"n_members": 1, "epochs": 1, "image_size": 32, "backbone": "timm:test_resnet", "weights": None}
    own = er.ImageRegressor(**settings, image="file", target=("interval", 0, 120), random_state=0)
    own.encoder_ = regressor.encoder_  # the weights without a package are random
    own._new_encoder = lambda *_: regressor.encoder_
    own.fit_file(data, "age")
    np.testing.assert_allclose(own.predict(frame), regressor.predict(frame), rtol=1e-5)


def test_either_kind_of_estimator_is_opened(model, tmp_path):
    found, state = load_estimator(model)
    assert type(found) is er.ImageRegressor and state["table"]["targets"] == ["age"]
    table = er.EnergyRegressor(n_members=1, epochs=1, width=8).fit(np.random.rand(40, 2), np.random.rand(40))
    assert type(load_estimator(table.save(tmp_path / "table"))[0]) is er.EnergyRegressor


@pytest.mark.parametrize("rows", [512, 16])
def test_predictions_are_the_estimators_in_bounded_memory(model, data, frame, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(compare, "BLOCK_ROWS", rows)
    seen = []
    extract = er.ImageRegressor._extract
    monkeypatch.setattr(
        er.ImageRegressor, "_extract", lambda self, files: seen.append(len(files)) or extract(self, files)
    )
    options = ["--quantiles", ".1,.9", "--id", "note", "--density-at-target", "--kind", "median"]
    succeed("predict", model, data, "-o", tmp_path / "p.parquet", *options)
    assert max(seen) == min(rows, COUNT)
    written = pd.read_parquet(tmp_path / "p.parquet")
    regressor = er.ImageRegressor.load(model)
    expected = [regressor.predict(frame, kind="median"), *regressor.predict_interval(frame, 0.9).T]
    expected += [*regressor.predict_quantiles(frame, [0.1, 0.9]).T, regressor.score_samples(frame, frame["age"])]
    names = ["median", "lower_90", "upper_90", "quantile_0.1", "quantile_0.9", "log_density"]
    assert list(written) == ["note", *names]
    np.testing.assert_allclose(written[names].to_numpy().T, expected, rtol=1e-4, atol=1e-4)


def test_each_image_goes_through_the_network_once(model, data, tmp_path, monkeypatch):
    seen = []
    forward = er.ImageEncoder.forward
    monkeypatch.setattr(er.ImageEncoder, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    options = ["--quantiles", ".1,.9", "--density-at-target"]
    succeed("predict", model, data, "-o", tmp_path / "p.csv", *options)
    assert sum(seen) == COUNT
    monkeypatch.setattr(report, "write", lambda *_, **__: None)  # drawing takes long
    succeed("report", model, data, "-o", tmp_path / "r.html")
    assert sum(seen) == 2 * COUNT


def test_scores_and_samples_are_the_estimators(model, data, frame, tmp_path):
    told = json.loads(succeed("evaluate", model, data, "--json").stdout)
    regressor = er.ImageRegressor.load(model)
    assert told["rows"] == COUNT
    assert told["scores"]["nll"] == pytest.approx(-regressor.score_samples(frame, frame["age"]).mean(), rel=1e-4)
    assert told["scores"]["rmse"] == pytest.approx(np.sqrt(np.mean((regressor.predict(frame) - frame["age"]) ** 2)))
    succeed("sample", model, data, "-o", tmp_path / "s.csv", "-n", "3", "--seed", "4")
    draws = pd.read_csv(tmp_path / "s.csv")
    assert list(draws) == ["row", "draw", "age"] and draws["row"].tolist()[2:4] == [1, 2]
    expected = regressor.sample(frame, 3, random_state=np.random.RandomState(4)).reshape(-1)
    np.testing.assert_allclose(draws["age"], expected, rtol=1e-4)


def test_info_tells_of_an_image_model(model):
    told = json.loads(succeed("info", model, "--json").stdout)
    assert told["columns"] == {"file": "image"} and told["settings"]["backbone"] == "timm:test_resnet"
    assert "file image" in succeed("info", model).stdout


def test_features_are_kept_and_the_last_stages_tuned_when_asked(data, tmp_path):
    options = ["--cache", tmp_path / "cache", "--fine-tune", "1", "--workers", "1", "--validation", data, "-q"]
    succeed("fit", data, "--image", "file", "-t", "age", "-o", tmp_path / "m", *TINY, *options)
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    assert kept
    before = [path.stat().st_mtime_ns for path in kept]
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    succeed("evaluate", tmp_path / "m", data, "-q")  # as on another machine
    assert not (tmp_path / "cache").exists()
    assert [path.stat().st_mtime_ns for path in (tmp_path / "elsewhere").rglob("*.safetensors")] == before
    _, state = checkpoint.load_estimator(tmp_path / "m")
    assert state["parameters"]["fine_tune"] == 1 and state["parameters"]["workers"] == 1


# ---------------------------------------------------------------------------------------------- bad input


def broken(folder, data, tmp_path, change):
    """A table beside the others whose rows are changed, and the path of a file that is no image."""
    (tmp_path / "bad.jpg").write_text("no image")
    frame = pd.read_csv(data, dtype={"file": object}).assign(
        file=[str(folder / name) for name in pd.read_csv(data)["file"]]
    )
    change(frame)
    frame.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def put(row, value, column="file"):
    def change(frame):
        frame.loc[row - 1, column] = value

    return change


def twice(frame):
    frame.loc[8, "file"] = frame.loc[4, "file"]


CASES = {
    "broken": (
        put(21, "bad.jpg"),
        r"t.csv: row 21: .*bad.jpg cannot be read as an image: .*, or pass --on-error skip.",
    ),
    "missing": (put(20, "gone.jpg"), r"t.csv: column 'file': .*gone.jpg \(row 20\) does not exist."),
    "no path": (put(19, np.nan), r"t.csv: column 'file' has no path in row 19; expected paths of images. Drop the row"),
    "twice": (
        twice,
        r"t.csv: column 'file' has .* in row 5 and in row 9; expected each file once. Drop one of the rows.",
    ),
    "target": (
        lambda frame: frame.__setitem__("age", [*frame["age"][:-1].astype(str), "old"]),
        r"t.csv: the target column 'age' has 'old' in row 40 \(1 such value\)",
    ),
    "outside": (put(3, 130.0, "age"), r"t.csv: the target has values outside .* row 3, column 'age': 130; expected"),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_names_file_and_row(folder, data, tmp_path, case):
    change, message = CASES[case]
    table = broken(folder, data, tmp_path, change)
    found = line_of(run("fit", table, "--image", "file", "-t", "age", "-o", tmp_path / "m", *TINY, "-q"))
    assert re.search(message, found), found
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("case", ["broken", "missing", "no path"])
@pytest.mark.parametrize("command", ["predict", "evaluate", "sample", "report"])
def test_predictions_name_file_and_row(folder, model, data, tmp_path, monkeypatch, command, case):
    monkeypatch.setattr(compare, "BLOCK_ROWS", 16)  # so that the row is in the second chunk
    change, message = CASES[case]
    table = broken(folder, data, tmp_path, change)
    output = {"evaluate": [], "report": ["-o", tmp_path / "r.html"]}.get(command, ["-o", tmp_path / "out.csv"])
    found = line_of(run(command, model, table, *output, "-q"))
    assert re.search(message.replace(", or pass --on-error skip", ""), found) and "pass" not in found, found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jpg", "t.csv"]


def test_rows_of_a_sample_are_named_by_their_number_in_the_table(folder, model, data, tmp_path):
    table = broken(folder, data, tmp_path, lambda frame: put(40, "gone.jpg")(frame) or put(39, "gone.jpg")(frame))
    for seed in range(20):
        result = run("report", model, table, "-o", tmp_path / "r.html", "-q", "--max-rows", "30", "--seed", seed)
        if result.exit_code == 2:
            break
    assert re.search(r"\(row (39|40)\)", line_of(result))


def test_broken_images_are_left_out_when_asked(folder, data, tmp_path):
    table = broken(folder, data, tmp_path, put(21, "bad.jpg"))
    options = ["--on-error", "skip", "--json", "-q"]
    result = succeed("fit", table, "--image", "file", "-t", "age", "-o", tmp_path / "m", *TINY, *options)
    assert json.loads(result.stdout)["rows"] == COUNT - 1
    assert f"1 of {COUNT} images could not be read and were left out" in line_of(result, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "1"], "--workers is for images; pass --image, the column of their files, too."),
        (["--image", "photo"], "there is no column 'photo' that --image names; the columns are 'file', 'age', 'note'."),
        (["--image", "file", "--drop", "note"], "--drop is for tables; with --image no other column is looked at."),
        (["--image", "file", "--backbone", "resnet18"], "backbone is 'resnet18'; there are packages for 'timm:"),
        (["--image", "file", "--backbone", "timm:test_resnet", "--weights", "gone.pth"], "gone.pth"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(data, tmp_path, options, message):
    found = line_of(run("fit", data, "-t", "age", "-o", tmp_path / "m", "--epochs", "1", "-q", *options))
    assert re.search(message, found), found


# ---------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def page(model, data, tmp_path_factory):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    path = tmp_path_factory.mktemp("report") / "r.html"
    succeed("report", model, data, "-o", path)
    return path.read_text()


def test_report_shows_images_beside_their_densities(page, model, frame):
    photos = re.findall(r'<img class="photo" src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)">\s*<svg', page)
    assert len(photos) == page.count("<img") >= 12
    sizes = [Image.open(io.BytesIO(base64.b64decode(photo))).size for photo, _ in photos]
    assert all(max(size) <= row_sections.THUMBNAIL for size in sizes) and (16, 20) in sizes
    regressor = er.ImageRegressor.load(model)
    interval = regressor.predict_interval(frame, 0.9)
    width = (interval[:, 1] - interval[:, 0]) / regressor.predict(frame, "median")  # relative, as ages are positive
    score = regressor.score_samples(frame, frame["age"])

    def shown(number):
        return f"{number:.4g}"

    def alternative(row):
        name = Path(frame["file"][row]).name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        low, high = map(shown, interval[row])
        return f"{name}: age observed {shown(frame['age'][row])}, 90% interval {low} to {high}"

    first = page[page.index('id="densities"') : page.index('id="rows"')]
    for row in (width.argmin(), width.argmax(), score.argmin()):
        assert alternative(int(row)) in first


def test_report_has_the_sections_of_tables_but_the_importances(page):
    for key in ("data", "scores", "calibration", "sharpness", "groups", "densities", "surprises", "modes", "partition"):
        assert f'id="{key}"' in page and f'href="#{key}"' in page
    assert 'id="importance"' not in page and "mportance" not in page
    assert "img-src data:" in page and not re.search(r"https?:", page) and f"{COUNT} files" in page
    assert "linear function of the network&#39;s features" in page


def test_report_refuses_images_of_other_rows(model, frame):
    regressor = er.ImageRegressor.load(model)
    with pytest.raises(ValueError, match="images has 1 files, but table has 40 rows"):
        table_report.describe(
            regressor, frame[["file"]], frame[["age"]].to_numpy(), ["age"], title="t", images=[frame["file"][0]]
        )


def test_several_targets_of_an_image_are_joint(folder, data, tmp_path, monkeypatch):
    for name in ("SHOWN_IMAGES", "SPREAD", "SURPRISING", "SEVERAL"):
        monkeypatch.setattr(row_sections, name, 1)
    frame = pd.read_csv(data)
    frame["file"] = [str(folder / name) for name in frame["file"]]
    frame.assign(height=150 + frame["age"] / 5).to_parquet(tmp_path / "t.parquet")
    options = [option if option != "interval:0,120" else "real" for option in TINY]
    table, model = tmp_path / "t.parquet", tmp_path / "m"
    succeed("fit", table, "--image", "file", "-t", "age", "-t", "height", "-o", model, *options, "-q")
    succeed("report", model, table, "-o", tmp_path / "r.html", "-q", "--max-rows", "20")
    page = (tmp_path / "r.html").read_text()
    assert re.search(r'alt="[^"]+: age observed [^"]+ to [^"]+; height observed [^"]+, 90% interval [^"]+"', page)
