from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from onebase.config.labels import Labels
from onebase.files.model_card import CardFacts, DataFacts, TrainingFacts, model_card, public_name

FACTS = CardFacts(
    name="definitions",
    base="smollm2-135m-instruct",
    base_fingerprint="abc",
    settings={
        "adapter.r": 16,
        "data.train": "/home/me/secret/define-train.jsonl",
        "adapter.target_modules": ["q_proj"],
    },
    training=TrainingFacts(
        data=[DataFacts("train", "/home/me/secret/define-train.jsonl", 8000, 8000, 160_000)],
        steps=100,
        examples=1600,
        tokens=94_000,
        train_loss=2.9,
        valid_loss_before=3.8312,
        valid_loss=2.7,
    ),
    trainable_parameters=4_884_480,
    total_parameters=139_399_488,
    onebase_version="0.1.0",
)


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    content = yaml.safe_load(matter)
    assert isinstance(content, dict)
    return content


def test_the_front_matter_is_what_the_hub_reads():
    matter = front_matter(model_card(FACTS))
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert matter["library_name"] == "peft"
    assert "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in matter["tags"]
    assert "license" not in matter


def test_the_card_says_what_was_learned_from_what_and_how_to_load_it():
    card = model_card(FACTS)
    for part in (
        "100 steps on 1,600 examples (94,000 tokens)",
        "over the whole run, a labelled token, was 2.9000",
        "| loss | 3.8312 | 2.7000 |",
        "| train | define-train.jsonl | 8,000 | 8,000 | 160,000 |",
        "| `adapter.r` | 16 |",
        "| `adapter.target_modules` | [q_proj] |",
        "4,884,480 of 139,399,488 (3.50%)",
        "PeftModel.from_pretrained",
        "onebase chat",
    ):
        assert part in card


def test_the_card_of_a_classifier_speaks_of_rows_and_classes_and_what_was_measured_of_them():
    scores = [("accuracy", "25.00 %", "87.50 %"), ("macro F1", "-", "0.8700")]
    told = {"steps": 9, "examples": 72, "tokens": 720, "train_loss": 0.5, "valid_loss_before": None, "valid_loss": 0.4}
    training = TrainingFacts(**{**vars(FACTS.training), **told, "scores": scores})
    labels = Labels("single_label_classification", ("cat", "do|g"))
    card = model_card(CardFacts(**{**vars(FACTS), "task": "classify", "training": training, "labels": labels}))
    for part in (
        "- Predicts: one of `cat`, `do\\|g`",
        "9 steps on 72 rows (720 tokens)",
        "over the whole run, a row, was 0.5000",
        "| loss | - | 0.4000 |\n| accuracy | 25.00 % | 87.50 % |\n| macro F1 | - | 0.8700 |",
        "| train | define-train.jsonl | 8,000 |\n",
        "onebase predict ADAPTER",
    ):
        assert part in card
    assert "labelled" not in card


def test_a_card_without_a_known_training_says_nothing_of_one():
    card = model_card(CardFacts(**{**vars(FACTS), "training": None}))
    assert "Training" not in card and "## Data" not in card and "| `adapter.r` | 16 |" in card


def test_the_card_of_a_combined_adapter_says_of_what_and_how_and_nothing_of_a_training():
    sources = [("law", 0.7), ("a|b", -0.5)]
    settings = {"how": "ties", "density": 0.5}
    card = model_card(
        CardFacts(**{**vars(FACTS), "training": None, "combined_from": sources, "settings": settings}),
    )
    for part in ("combined from others with onebase 0.1.0", "| law | 0.7 |", "| a\\|b | -0.5 |", "| `density` | 0.5 |"):
        assert part in card
    assert "train" not in card.replace("from_pretrained", "") and "PeftModel.from_pretrained" in card


def test_the_card_opens_a_packaged_base_by_the_folder_that_transformers_knows():
    assert 'AutoModelForCausalLM.from_pretrained(onebase.model_path("smollm2-135m-instruct"))' in model_card(FACTS)
    on_hub = model_card(CardFacts(**{**vars(FACTS), "base": "org/model"}))
    assert 'AutoModelForCausalLM.from_pretrained("org/model")' in on_hub and "import onebase" not in on_hub


def test_the_card_names_no_folder_of_this_machine():
    facts = CardFacts(**{**vars(FACTS), "base": "/home/me/secret/models/mine"})
    card = model_card(facts)
    assert "/home" not in card and "secret" not in card
    assert front_matter(card)["base_model"] == "mine"


def test_a_name_on_the_hub_stays_whole():
    names = ["org/model", "./models/mine", "/x/model.gguf", "folder/model.gguf", "~/m", "C:\\models\\m"]
    assert [public_name(name) for name in names][:4] == ["org/model", "mine", "model.gguf", "model.gguf"]


texts = st.text(max_size=20)


@given(texts, st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts | st.lists(texts)))
def test_any_name_and_any_settings_make_a_card_whose_front_matter_can_be_read(name, settings):
    facts = CardFacts(**{**vars(FACTS), "base": name or "x", "settings": settings})
    assert model_card(facts) == model_card(facts)
    assert set(front_matter(model_card(facts))) == {"base_model", "library_name", "pipeline_tag", "tags"}
