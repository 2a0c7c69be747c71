"""Metrics are scikit-learn's, intervals those of a plain loop over the same draws, slices every row once."""

import tracemalloc
import warnings

import numpy as np
import pytest
import sklearn.metrics as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.exceptions import UndefinedMetricWarning

from onebase.errors import ConfigError, DataError
from onebase.measure.metrics import class_scores, multi_label_scores, number_scores, resample, slices_of, with_intervals

SCORES = {"class": class_scores, "multi_label": multi_label_scores, "number": number_scores}


@st.composite
def classified(draw):
    """Return probabilities with many ties, on bin edges too, and targets that may leave classes out."""
    classes, examples = draw(st.integers(2, 5)), draw(st.integers(1, 25))
    row = st.lists(st.integers(0, 3), min_size=classes, max_size=classes).filter(any)
    parts = np.array(draw(st.lists(row, min_size=examples, max_size=examples)), dtype=np.float64)
    targets = draw(st.lists(st.integers(0, classes - 1), min_size=examples, max_size=examples))
    return parts / parts.sum(1, keepdims=True), np.array(targets)


@st.composite
def labelled(draw):
    """Return probabilities in fifteenths and tenths, so that bin edges, one half and ties are common, and labels."""
    classes, examples = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    one = st.one_of(st.integers(0, 15).map(lambda n: n / 15), st.integers(0, 10).map(lambda n: n / 10))
    size = examples * classes
    probabilities = draw(st.lists(one, min_size=size, max_size=size))
    targets = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    return np.array(probabilities).reshape(-1, classes), np.array(targets).reshape(-1, classes)


@st.composite
def numbered(draw):
    """Return predictions and targets, constant ones too."""
    examples = draw(st.integers(1, 25))
    numbers = st.one_of(
        st.lists(st.floats(-100, 100, width=32), min_size=examples, max_size=examples),
        st.integers(-3, 3).map(lambda n: [n / 10] * examples),
    )
    return np.array(draw(numbers)), np.array(draw(numbers))


def present(**scores):
    """Return the scores without those that are undefined."""
    return {name: value for name, value in scores.items() if value is not None}


def f1(targets, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        value = oracle.f1_score(targets, predicted, average="macro", zero_division=np.nan)
    return None if np.isnan(value) else value


def mean_auroc(actual, scores):
    """Return the mean of the areas of the columns that have both positives and negatives."""
    both = actual.any(0) & ~actual.all(0)
    areas = [oracle.roc_auc_score(a, s) for a, s in zip(actual.T[both], scores.T[both], strict=True)]
    return np.mean(areas) if areas else None


def calibration(right, confidences):
    """Return ECE from scikit-learn's bins, weighted by how many decisions are in each."""
    fraction, mean = calibration_curve(right.astype(int), confidences, n_bins=15, pos_label=1)
    sizes = np.bincount(np.digitize(confidences, np.linspace(0, 1, 16), right=True))
    return (sizes[sizes > 0] / len(right) * np.abs(fraction - mean)).sum()


def class_oracle(probabilities, targets):
    predicted, classes = probabilities.argmax(1), probabilities.shape[1]
    actual = targets[:, None] == np.arange(classes)
    one = slice(1, 2) if classes == 2 else slice(None)
    return present(
        accuracy=oracle.accuracy_score(targets, predicted),
        macro_f1=f1(targets, predicted),
        auroc=mean_auroc(actual[:, one], probabilities[:, one]),
        ece=calibration(predicted == targets, probabilities.max(1)),
        brier=oracle.brier_score_loss(targets, probabilities, labels=range(classes), scale_by_half=False),
    )


def multi_label_oracle(probabilities, targets):
    predicted = (probabilities > 0.5).astype(int)
    decided = np.where(predicted == 1, probabilities, 1 - probabilities)
    one_column = targets.shape[1] == 1  # which scikit-learn takes for two classes
    return present(
        accuracy=oracle.accuracy_score(targets, predicted),
        macro_f1=f1(*(np.pad(one, ((0, 0), (0, 1))) if one_column else one for one in (targets, predicted))),
        auroc=mean_auroc(targets.astype(bool), probabilities),
        ece=calibration((predicted == targets).ravel(), decided.ravel()),
        brier=oracle.mean_squared_error(targets, probabilities),
    )


def number_oracle(predictions, targets):
    return present(
        mse=oracle.mean_squared_error(targets, predictions),
        mae=oracle.mean_absolute_error(targets, predictions),
        r2=oracle.r2_score(targets, predictions) if len(set(targets)) > 1 else None,
    )


ORACLES = {"class": class_oracle, "multi_label": multi_label_oracle, "number": number_oracle}


def example_of(kind, examples=30):
    """Return outputs and targets of a model that is right more often than not, with ties and one rare class."""
    draws = np.random.default_rng(7)
    if kind == "number":
        targets = draws.normal(size=examples)
        return targets + draws.normal(scale=0.5, size=examples), targets
    targets = draws.choice(4, size=examples, p=[0.5, 0.3, 0.17, 0.03])
    parts = draws.integers(1, 5, size=(examples, 4)) + 4.0 * (targets[:, None] == np.arange(4))
    probabilities = parts / parts.sum(1, keepdims=True)
    if kind == "class":
        return probabilities, targets
    return np.minimum(1.0, probabilities * 1.5), (draws.random(parts.shape) < probabilities).astype(int)


@given(classified())
def test_the_scores_of_classes_are_those_of_scikit_learn(case):
    assert class_scores(*case) == pytest.approx(class_oracle(*case), rel=1e-9, abs=1e-12)


@given(labelled())
def test_the_scores_of_labels_are_those_of_scikit_learn(case):
    assert multi_label_scores(*case) == pytest.approx(multi_label_oracle(*case), rel=1e-9, abs=1e-12)


@given(numbered())
def test_the_scores_of_numbers_are_those_of_scikit_learn(case):
    assert number_scores(*case) == pytest.approx(number_oracle(*case), rel=1e-9, abs=1e-12)


def test_where_every_class_occurs_the_defaults_of_scikit_learn_give_the_same():
    probabilities, targets = example_of("class", 200)
    scores = class_scores(probabilities, targets)
    assert set(targets) == {0, 1, 2, 3}
    assert scores["auroc"] == pytest.approx(oracle.roc_auc_score(targets, probabilities, multi_class="ovr"))
    assert scores["macro_f1"] == pytest.approx(oracle.f1_score(targets, probabilities.argmax(1), average="macro"))
    assert scores["brier"] == pytest.approx(oracle.brier_score_loss(targets, probabilities))
    probabilities, targets = example_of("multi_label", 200)
    scores = multi_label_scores(probabilities, targets)
    assert scores["auroc"] == pytest.approx(oracle.roc_auc_score(targets, probabilities))
    assert scores["macro_f1"] == pytest.approx(oracle.f1_score(targets, probabilities > 0.5, average="macro"))


def test_two_classes_have_the_area_of_class_1():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]])
    assert class_scores(probabilities, np.array([0, 0, 1, 1]))["auroc"] == 0.75
    assert class_scores(probabilities, np.array([1, 1, 0, 0]))["auroc"] == 0.25
    # Where class 0's probability is 1 to the last bit, class 1's still orders the examples.
    assert class_scores(np.array([[1.0, 1e-20], [1.0, 1e-19]]), np.array([0, 1]))["auroc"] == 1.0


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    # 0.6 = 9/15 closes the bin of 0.55, where the gaps -0.55 and 0.4 partly cancel; that of 0.65 would leave 0.95 / 2.
    probabilities = np.array([[0.55, 0.45], [0.6, 0.4]])
    assert class_scores(probabilities, np.array([1, 0]))["ece"] == pytest.approx(0.15 / 2)


def test_what_is_undefined_is_left_out_and_the_rest_stays():
    same = np.array([[0.7, 0.2, 0.1]])
    assert class_scores(same, np.array([0])).keys() == {"accuracy", "macro_f1", "ece", "brier"}
    assert multi_label_scores(same / 2, np.zeros((1, 3), dtype=int)).keys() == {"accuracy", "ece", "brier"}
    assert number_scores(np.array([1.0, 2.0]), np.array([0.1, 0.1])).keys() == {"mse", "mae"}
    for estimates in (
        with_intervals("class", same, np.array([0]), resamples=100),
        with_intervals("number", np.array([1.0, 2.0, 3.0]), np.full(3, 0.1), resamples=100),
    ):
        assert not {"auroc", "r2"} & estimates.keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_narrow_outputs_are_measured_in_fp64(dtype):
    probabilities, targets = example_of("class")
    narrow = probabilities.astype(dtype)
    wide = narrow.astype(np.float64)
    assert class_scores(narrow, targets) == class_scores(wide, targets)


@pytest.mark.parametrize("kind", SCORES)
def test_intervals_are_those_of_a_loop_over_the_same_draws(kind):
    outputs, targets = example_of(kind)
    estimates = with_intervals(kind, outputs, targets, resamples=100, seed=3, level=0.9)
    loop = []
    for number in range(100):
        drawn = resample(len(targets), 3, number)
        loop.append(ORACLES[kind](outputs[drawn], targets[drawn]))
    for name, estimate in estimates.items():
        values = [scores[name] for scores in loop if name in scores]
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(values, [5, 95])), abs=1e-12)
    assert {name: estimate.value for name, estimate in estimates.items()} == SCORES[kind](outputs, targets)
    assert estimates.keys() == ORACLES[kind](outputs, targets).keys()


@pytest.mark.parametrize("kind", SCORES)
@given(data=st.data())
@settings(max_examples=20)
def test_intervals_are_finite_ordered_and_of_the_plain_scores_whatever_the_examples(kind, data):
    outputs, targets = data.draw({"class": classified(), "multi_label": labelled(), "number": numbered()}[kind])
    estimates = with_intervals(kind, outputs, targets, resamples=100)
    assert {name: estimate.value for name, estimate in estimates.items()} == SCORES[kind](outputs, targets)
    assert all(-np.inf < estimate.low <= estimate.high < np.inf for estimate in estimates.values())


def test_a_seed_repeats_its_draws_another_does_not_and_the_global_generator_is_left_alone():
    outputs, targets = example_of("class")
    before = repr(np.random.get_state())  # noqa: NPY002  the generator that must not be touched
    first = with_intervals("class", outputs, targets, seed=1)
    assert with_intervals("class", outputs, targets, seed=1) == first
    assert with_intervals("class", outputs, targets, seed=2)["brier"] != first["brier"]
    assert repr(np.random.get_state()) == before  # noqa: NPY002


@pytest.mark.parametrize("kind", SCORES)
def test_resamples_worked_on_in_chunks_give_the_same(kind, monkeypatch):
    outputs, targets = example_of(kind)
    whole = with_intervals(kind, outputs, targets, resamples=150)
    monkeypatch.setattr("onebase.measure.metrics._CHUNK_COUNTS", 7 * len(targets))
    for name, estimate in with_intervals(kind, outputs, targets, resamples=150).items():
        assert estimate.value == whole[name].value
        assert (estimate.low, estimate.high) == pytest.approx((whole[name].low, whole[name].high), rel=1e-12)


def test_memory_does_not_grow_with_the_number_of_resamples():
    outputs, targets = example_of("class", 2000)
    with_intervals("class", outputs, targets, resamples=200)
    tracemalloc.start()
    with_intervals("class", outputs, targets, resamples=2000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2000 * 2000 * 8 / 2


def test_intervals_hold_the_true_value_as_often_as_they_say():
    draws, held = np.random.default_rng(0), {"accuracy": 0, "brier": 0, "mae": 0}
    simulations, examples = 150, 80
    for _ in range(simulations):
        # The model says 0.7 and is right with probability 0.8; numbers miss by a Laplace draw, whose mean size is 1.
        targets = (draws.random(examples) > 0.8).astype(int)
        probabilities = np.tile([0.7, 0.3], (examples, 1))
        found = with_intervals("class", probabilities, targets, resamples=200, level=0.9)
        zeros = np.zeros(examples)
        found |= with_intervals("number", draws.laplace(size=examples), zeros, resamples=200, level=0.9)
        for name, true in {"accuracy": 0.8, "brier": 0.8 * 0.18 + 0.2 * 0.98, "mae": 1.0}.items():
            held[name] += found[name].low <= true <= found[name].high
    assert all(0.84 < count / simulations < 0.95 for count in held.values()), held


@pytest.mark.parametrize(
    ("kind", "outputs", "targets", "message"),
    [
        ("class", np.zeros((0, 3)), np.zeros(0, dtype=int), "0 examples: there is nothing to measure"),
        ("number", np.zeros(0), np.zeros(0), "0 examples"),
        (
            "class",
            [[0.5, 0.5], [0.5, 0.6]],
            [0, 1],
            r"example 1: probabilities must sum to 1, got 1.1 \(the first of 1 such",
        ),
        ("class", [[0.5, 0.5], [1.2, -0.2]], [0, 1], "example 1: a probability must be a number from 0 to 1, got 1.2"),
        ("class", [[np.nan, 0.5]], [0], "example 0: a probability must be a number from 0 to 1, got nan"),
        (
            "class",
            [[0.5, 0.5]] * 3,
            [0, 2, -1],
            r"example 1: a target must be a class from 0 to 1, got 2 \(the first of 2 such",
        ),
        ("multi_label", [[0.5, 0.9]], [[0, 2]], "example 0: a label's target must be 0 or 1, got 2"),
        ("multi_label", [[0.5, np.inf]], [[0, 1]], "example 0: a probability must be .*, got inf"),
        ("number", [0.5, np.nan], [0.0, 1.0], "example 1: a prediction must be a finite number, got nan"),
        ("number", [0.5, 1.0], [0.0, -np.inf], "example 1: a target must be a finite number, got -inf"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_place(kind, outputs, targets, message):
    outputs, targets = np.array(outputs), np.array(targets)
    for measure in (SCORES[kind], lambda *arrays: with_intervals(kind, *arrays)):
        with pytest.raises(DataError, match=message):
            measure(outputs, targets)


def test_intervals_from_too_few_resamples_or_of_no_level_are_refused():
    numbers = np.array([1.0, 2.0])
    with pytest.raises(ConfigError, match="resamples: must be at least 100 for an interval, got 99"):
        with_intervals("number", numbers, numbers, resamples=99)
    with pytest.raises(ConfigError, match=r"level: must be between 0 and 1, such as 0\.95, got 95"):
        with_intervals("number", numbers, numbers, level=95.0)


def test_slices_stand_by_frequency_with_their_rows_as_text():
    rows: list[dict] = [
        {"lang": "de", "n": 1},
        {"lang": "en", "n": 2.5},
        {"lang": "en"},
        {"lang": None, "n": True},
        {"lang": "da"},
    ]
    found = slices_of(rows, ["n", "lang"])
    assert {column: [(value, at.tolist()) for value, at in slices] for column, slices in found.items()} == {
        "n": [("(none)", [2, 4]), ("1", [0]), ("2.5", [1]), ("True", [3])],
        "lang": [("en", [1, 2]), ("(none)", [3]), ("da", [4]), ("de", [0])],
    }
    assert list(found) == ["n", "lang"]


@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.none() | st.integers(0, 2)), min_size=1))
def test_every_row_is_in_one_slice_of_each_column(rows):
    columns = sorted({column for row in rows for column in row})
    for column, slices in slices_of(rows, columns).items():
        assert sorted(np.concatenate([at for _, at in slices]).tolist()) == list(range(len(rows)))
        sizes = [len(at) for _, at in slices]
        assert sizes == sorted(sizes, reverse=True)
        for value, at in slices:
            texts = {"(none)" if rows[i].get(column) is None else str(rows[i][column]) for i in at}
            assert texts == {value}


def test_a_column_that_no_row_has_is_refused_with_those_there_are():
    rows: list[dict] = [{"text": "a", "label": 0}, {"text": "b", "language": "en"}]
    with pytest.raises(ConfigError) as caught:
        slices_of(rows, ["label", "langage"])
    assert str(caught.value) == (
        "eval.slices: no row has the column 'langage'; closest is 'language'. "
        "The columns are: 'text', 'label', 'language'."
    )
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*'topic'.*'source'"):
        slices_of(rows, ["topic", "source"])
