"""Students as GGUF files: what the file holds, what comes back, and what is refused."""

import sys

import gguf
import pytest
import torch
from conftest import errors_of, random_batches, tiny_model
from families import FAMILIES, family_model, pruned_qwen2
from trained_tokenizers import SIZE, byte_level, sentencepiece, texts
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import gguf_tokenizer_mapping

from hf_layerprune import LayerPruneError, cli, load_model, load_tokenizer, merge, parallelize, prune
from hf_layerprune.export import export_gguf
from hf_layerprune.gguf_vocabulary import CONTROL, NORMAL, SPLITS, UNUSED, USER_DEFINED, vocabulary_of
from hf_layerprune.modelfile import chat_format, modelfile

COMMON = {"vocab_size": SIZE, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {"head_dim": 16, "attention_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
}
WAYS = ("qwen2", "llama-bpe", "smaug-bpe", "tekken", "gpt-2", "smollm")


def run(*arguments):
    return cli.main(["export", *map(str, arguments)])


def written(model, path, tokenizer=None, outtype="f32"):
    return export_gguf(model, tokenizer or byte_level("qwen2"), path / "model.gguf", outtype)


def field(reader, key):
    return reader.fields[key].contents()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder with a student of Qwen2."""
    folder = tmp_path_factory.mktemp("students") / "small"
    prune(tiny_model(**COMMON), [1]).save_pretrained(folder)
    byte_level("qwen2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_the_same_model(name, tmp_path, monkeypatch):
    family, changes = MODELS[name]
    model = prune(family_model(family, **COMMON | changes), [2])
    monkeypatch.setattr("hf_layerprune.loading.GGUF_DTYPE", torch.float32)
    again = load_model(str(written(model, tmp_path)), dtype="float32")
    (batch,) = random_batches(1)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert again.config.num_hidden_layers == 4 and set(MODELS) and set(FAMILIES) >= {family}


def test_a_merged_student_is_a_plain_one(tmp_path):
    model = merge(tiny_model(**COMMON), [(2, 3)], random_batches(2, padded=False))
    again = load_model(str(written(model, tmp_path)), dtype="float32")
    assert again.config.num_hidden_layers == 4
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float()), name


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_come_back(way, tmp_path):
    tokenizer = byte_level(way)
    path = written(tiny_model(**COMMON), tmp_path, tokenizer)
    assert field(gguf.GGUFReader(path), "tokenizer.ggml.pre") == way
    again = load_tokenizer(str(path))
    for text in texts(tokenizer):
        assert again(text).input_ids == tokenizer(text).input_ids, text
    assert again.chat_template == tokenizer.chat_template and again.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_of_sentencepiece(legacy, tmp_path):
    tokenizer = sentencepiece(legacy)
    path = written(family_model("llama", **COMMON), tmp_path, tokenizer)
    reader = gguf.GGUFReader(path)
    assert field(reader, "tokenizer.ggml.model") == "llama" and field(reader, "tokenizer.ggml.add_bos_token")
    assert field(reader, "tokenizer.ggml.token_type")[:4] == [2, 3, 3, 6]
    scores, known = field(reader, "tokenizer.ggml.scores"), tokenizer.get_vocab()
    assert scores[known["▁the"]] < scores[known["▁t"]] <= 0
    again = load_tokenizer(str(path))
    for text in ("Hello, world! It's a test", "中文 and 😀", "  two spaces"):
        assert again(text).input_ids == sentencepiece(False)(text).input_ids, text


def test_what_the_file_says(tmp_path):
    model = prune(family_model("qwen3", **COMMON), [0])
    reader = gguf.GGUFReader(written(model, tmp_path, outtype="q8_0"))
    said = {key: field(reader, f"qwen3.{key}") for key in ("block_count", "embedding_length", "attention.key_length")}
    assert said == {"block_count": 4, "embedding_length": 32, "attention.key_length": 16}
    types = field(reader, "tokenizer.ggml.token_type")
    tokens = field(reader, "tokenizer.ggml.tokens")
    known = byte_level("qwen2").get_vocab()
    assert types[known["<|im_end|>"]] == CONTROL and types[known["<tool>"]] == USER_DEFINED
    assert types[known["a"]] == NORMAL and (tokens[-1], types[-1]) == (f"[PAD{SIZE - 1}]", UNUSED)
    assert field(reader, "general.name") == "model" and not field(reader, "tokenizer.ggml.add_bos_token")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.3.attn_q.weight"] == "Q8_0" and "output.weight" not in kinds
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 48
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}


@pytest.mark.parametrize("outtype, error", [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_smaller_types_are_near(outtype, error, tmp_path):
    model = tiny_model(**COMMON)
    again = load_model(str(written(model, tmp_path, outtype=outtype)), dtype="float32")
    for name, tensor in again.state_dict().items():
        wanted = model.state_dict()[name]
        assert (tensor - wanted).abs().max() <= (error + 4e-3) * wanted.abs().max(), name  # read as bfloat16


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: parallelize(tiny_model(**COMMON), [(1, 2)]), r"layers run in parallel \(1\|2\)"),
        (lambda: pruned_qwen2(tiny_model(**COMMON)), r"layers run in parallel \(none\)"),
        (lambda: family_model("qwen3", attention_bias=True, **COMMON), "no Qwen3 with attention_bias"),
        (lambda: family_model("qwen2", head_dim=16, **COMMON), "no Qwen2 with head_dim=16"),
        (lambda: family_model("llama", hidden_act="gelu", **COMMON), "hidden_act='gelu'"),
        (lambda: family_model("qwen2", rope_parameters=LLAMA3, **COMMON), r"scaled \(llama3\)"),
        (lambda: family_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                              **COMMON), r"scaled \(dynamic\)"),
        (lambda: family_model("llama", rope_parameters=LLAMA3 | {"rope_type": "yarn", "mscale": 0.7}, **COMMON),
         "YaRN with high_freq_factor, low_freq_factor, mscale"),
        (lambda: tiny_model(vocab_size=300), "481 tokens, the model only 300"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_not_compute_is_refused(model, message, tmp_path):
    with pytest.raises(LayerPruneError, match=message):
        written(model(), tmp_path)
    assert not list(tmp_path.iterdir())


def changed(change):
    """A tokenizer with something that a GGUF file cannot say."""
    from tokenizers import Tokenizer

    original = byte_level("qwen2")
    backend = Tokenizer.from_str(original.backend_tokenizer.to_str())
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.skipif(
    not hasattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS"), reason="this release has no such table"
)
def test_the_patterns_are_those_of_transformers():
    theirs = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    assert {theirs[way]: way for way in ("qwen2", "llama-bpe", "tekken")} == SPLITS


def test_tokenizers_that_llama_cpp_lacks_are_refused():
    from tokenizers import AddedToken, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    def other_end(backend):
        backend.post_processor = TemplateProcessing(single="$A <tool>", special_tokens=[("<tool>", 480)])

    for change, message in (
        (lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()), "does not split text like"),
        (lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), "does not split text like"),
        (lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)]), "<x> strips the spaces around it"),
        (other_end, "adds tokens other than"),
    ):
        with pytest.raises(LayerPruneError, match=message):
            vocabulary_of(changed(change), tiny_model(**COMMON).config)
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level("qwen2").backend_tokenizer)
    with pytest.raises(LayerPruneError, match="names an end token"):
        vocabulary_of(endless, tiny_model(**COMMON | {"eos_token_id": None}).config)


def test_the_verb_writes_a_file_and_says_how_to_run_it(student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(student, "--format", "gguf", "--outtype", "q8_0") == 0
    out = capsys.readouterr().out
    assert "gguf: small-q8_0.gguf   4 layers, q8_0" in out and "llama-cli -m small-q8_0.gguf" in out
    assert "ollama create small -f Modelfile && ollama run small" in out
    assert (tmp_path / "Modelfile").read_text() == modelfile("small-q8_0.gguf", byte_level("qwen2"))
    assert {path.name for path in tmp_path.iterdir()} == {"small-q8_0.gguf", "Modelfile"}
    assert run(student, "--outtype", "f16", "--output_file", "deep/er/x.gguf") == 0
    assert (tmp_path / "deep" / "er" / "Modelfile").is_file()
    assert run(student, "--outtype", "f16") == 0  # another file, next to the first
    assert "ollama create small -f small-f16.Modelfile" in capsys.readouterr().out
    assert "FROM ./small-q8_0.gguf\n" in (tmp_path / "Modelfile").read_text()
    assert "FROM ./small-f16.gguf\n" in (tmp_path / "small-f16.Modelfile").read_text()
    (tmp_path / "small-q8_0.gguf").unlink()
    assert run(student, "--outtype", "q8_0") == 0 and "-f Modelfile &&" in capsys.readouterr().out


def test_the_round_trip(student, tmp_path, monkeypatch, capsys):
    """A file goes in, is compressed, and comes out."""
    monkeypatch.chdir(tmp_path)
    assert run(student, "--output_file", "in.gguf") == 0
    quick = ["--dataset", "embedded:healing", "--target_num_layers", 3, "--max_steps", 1, "--num_eval_samples", 2,
             "--num_calibration_samples", 2, "--per_device_train_batch_size", 2, "--max_length", 32, "--save_strategy",
             "no", "--report_to", "none", "--measure_speed", "false"]  # fmt: skip
    assert cli.main(["compress", "--model", "in.gguf", "--output_dir", "run", *map(str, quick)]) == 0
    assert run("run") == 0, capsys.readouterr().err
    again, tokenizer = load_model("run-f16.gguf"), load_tokenizer("run-f16.gguf")
    assert again.config.num_hidden_layers == 3
    for text in texts(tokenizer):
        assert tokenizer(text).input_ids == byte_level("qwen2")(text).input_ids
    assert tokenizer.chat_template == byte_level("qwen2").chat_template


def test_mistakes_are_one_line(student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = parallelize(tiny_model(**COMMON), [(1, 2)])
    pairs.save_pretrained("pairs")
    byte_level("qwen2").save_pretrained("pairs")
    (tmp_path / "there.gguf").write_text("mine")
    capsys.readouterr()  # the bar of saving
    for arguments, message in (
        ((), "which student?"),
        (("nowhere",), "nowhere cannot be loaded"),
        (("pairs",), r"pairs: layers run in parallel"),
        ((student, "--outtype", "q4"), "outtype"),
        ((student, "--output_file", "there.gguf"), "there.gguf exists"),
        ((student, "--output_file", "x.bin"), "must end in .gguf"),
    ):
        assert run(*arguments) == 2
        error = errors_of(capsys).strip()
        assert "\n" not in error and message in error, error
    (tmp_path / "Modelfile").write_text("FROM llama3")
    assert run(student) == 2 and "Modelfile exists and is your own" in errors_of(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs", "there.gguf", "Modelfile"}
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run(student, "--output_file", "a/x.gguf") == 2
    assert "pip install 'hf-layerprune[gguf]'" in errors_of(capsys)


def test_a_chat_template_becomes_ollamas():
    chat = chat_format(byte_level("qwen2"))
    assert chat.system == "Be kind." and chat.opening == "<|im_start|>assistant\n"
    assert chat.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    text = chat.to_modelfile()
    assert text.startswith(
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
    )
    assert text.endswith('{{ end }}{{ end }}<|im_start|>assistant\n"""\nSYSTEM """Be kind."""\n')


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{{ strftime_now('%d') }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>",
        "{% for m in messages %}{{ loop.index }}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>",
        "{% for m in messages %}{{ raise_exception('no') if m['role'] == 'system' }}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ '{{' + m['role'] }}{{ m['content'] }}{% endfor %}>",
    ],
)
def test_what_is_no_plain_sequence_of_messages_is_left_to_ollama(template):
    tokenizer = changed(lambda backend: None)
    tokenizer.chat_template = template
    assert chat_format(tokenizer) is None
    assert modelfile("x.gguf", tokenizer).splitlines()[1:] == ["FROM ./x.gguf"]
