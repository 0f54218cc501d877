"""Generated ids are legal at their place, and what is written can be heard."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.errors import ConfigError, DataError
from mmoe.evaluation import generate as module
from mmoe.evaluation.generate import CodeGrammar, Sampling, generate, speak
from mmoe.tokenizers.audio import code_order, deserialize
from mmoe.tokenizers.vocabulary import Structure
from tests.data.synthetic import RATE, fit_codec, png


@settings(deadline=None)
@given(st.integers(1, 4), st.sampled_from(["flat", "delay"]), st.integers(1, 9), st.integers(0, 99))
def test_a_legal_stream_is_a_layout_of_some_number_of_frames(codebooks, layout, most, seed):
    rng = np.random.default_rng(seed)
    grammar, stream = CodeGrammar(codebooks, layout, most), []
    while True:
        choices, may_end = grammar.legal()
        assert choices or may_end
        if may_end and (not choices or rng.random() < 0.3):
            break
        stream.append(int(rng.choice(choices)))
        grammar.advance(stream[-1])
    frames, rest = divmod(len(stream), codebooks)
    assert rest == 0 and 1 <= frames <= most
    np.testing.assert_array_equal(stream, code_order(frames, codebooks, layout)[1])
    assert deserialize(np.array(stream), frames, codebooks, layout).shape == (frames, codebooks)


def test_every_number_of_frames_can_be_said():
    for layout in ("flat", "delay"):
        for frames in range(1, 6):
            grammar = CodeGrammar(3, layout, 5)
            for codebook in code_order(frames, 3, layout)[1].tolist():
                assert codebook in grammar.legal()[0]
                grammar.advance(codebook)
            assert grammar.legal()[1]


def draws(sampling: Sampling, logits, legal, n: int = 300) -> set[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return {sampling.draw(logits, legal, generator) for _ in range(n)}


def test_sampling_keeps_to_the_legal_the_likeliest_and_their_share():
    logits = torch.tensor([9.0, 1.0, 2.0, 3.0, 8.0, 0.0])
    legal = torch.tensor([1, 2, 3, 5])
    assert draws(Sampling(temperature=5.0), logits, legal) == {1, 2, 3, 5}
    assert draws(Sampling(temperature=5.0, top_k=2), logits, legal) == {2, 3}
    assert draws(Sampling(temperature=0.0), logits, legal) == {3}
    assert draws(Sampling(temperature=1.0, top_p=0.5), logits, legal) == {3}
    assert draws(Sampling(temperature=1.0, top_p=0.7), logits, legal) == {2, 3}
    with pytest.raises(ValueError):
        Sampling(top_p=0.0)


def test_text_is_made_of_text_and_the_same_for_the_same_seed(run, monkeypatch):
    drawn = []
    draw = Sampling.draw

    def record(self, logits, legal, generator):
        drawn.append(draw(self, logits, legal, generator))
        return drawn[-1]

    monkeypatch.setattr(Sampling, "draw", record)
    first = generate(run, "abc", max_tokens=12, sampling=Sampling(temperature=2.0, seed=1))
    again = generate(run, "abc", max_tokens=12, sampling=Sampling(temperature=2.0, seed=1))
    other = generate(run, "abc", max_tokens=12, sampling=Sampling(temperature=2.0, seed=2))
    assert first == again != other
    assert set(drawn) <= {*run.tokenizers.vocabulary.ranges["text"], int(Structure.EOS)}


def test_greedy_text_is_what_the_model_expects_next(run, monkeypatch):
    """Each token is the likeliest after everything before it, in one forward pass over the finished document."""
    drawn, draw = [], Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    generate(run, "ab", max_tokens=8, sampling=Sampling(temperature=0.0))
    texts = run.tokenizers.vocabulary.ranges["text"]
    ids = np.r_[texts.start + run.tokenizers.text.encode("ab"), drawn]
    whole = module._Prompt(None, None, ids).builder(run)
    whole.text(ids, -1)
    legal = [int(Structure.EOS), *texts]
    with module.inference(run):
        for at, token in enumerate(drawn, start=2):
            assert legal[int(module._logits(run, whole.finish(), at)[legal].argmax())] == token


def test_an_image_and_an_audio_clip_stand_before_the_prompt(run, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a.png").write_bytes(png(rng, 24, 32))
    soundfile.write(tmp_path / "a.wav", rng.uniform(-0.3, 0.3, 2 * RATE // 4), RATE)
    plain = generate(run, "abc", max_tokens=6, sampling=Sampling(temperature=0.0))
    with_both = generate(
        run, "abc", image=tmp_path / "a.png", audio=tmp_path / "a.wav", max_tokens=6, sampling=Sampling(temperature=0.0)
    )
    assert isinstance(plain, str) and isinstance(with_both, str)
    with pytest.raises(DataError, match="missing.png cannot be read"):
        generate(run, "abc", image=tmp_path / "missing.png")
    left = rng.uniform(-0.3, 0.3, RATE)
    soundfile.write(tmp_path / "b.wav", np.stack([left, -left], axis=1), RATE)
    with pytest.raises(DataError, match=r"b\.wav is silent, since its channels cancel out.*give a file of one of them"):
        generate(run, "abc", audio=tmp_path / "b.wav")


@pytest.mark.parametrize("layout", ["flat", "delay"])
def test_audio_is_written_at_the_length_of_its_frames(build_run, prepared, tmp_path, layout):
    audio = fit_codec(prepared / "codec.safetensors").model_dump(mode="json") | {"layout": layout}
    run = build_run(tokenizers__audio=audio)
    seconds = speak(run, tmp_path / "out.wav", prompt="ab", seconds=0.5, sampling=Sampling(temperature=1.5))
    wave, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == RATE and len(wave) == round(seconds * RATE)
    assert 0 < seconds <= 0.56 and np.isfinite(wave).all()


def test_what_does_not_fit_a_sequence_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="data.sequence_length of .* is 160"):
        generate(run, "a" * 150, max_tokens=64)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        speak(run, tmp_path / "out.wav", seconds=60.0)
    assert not (tmp_path / "out.wav").exists()


def test_a_run_without_the_modality_says_so(build_run, tmp_path):
    run = build_run(names=("text",), tokenizers__audio=None)
    with pytest.raises(ConfigError, match="tokenizers.audio is null"):
        speak(run, tmp_path / "out.wav")
    with pytest.raises(ConfigError, match="leave --image out"):
        generate(run, "a", image=tmp_path / "a.png")
    with pytest.raises(ConfigError, match="leave --audio out"):
        generate(run, "a", audio=tmp_path / "a.wav")
