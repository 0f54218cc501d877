"""Adapters of pretrained codecs, on tiny models with random weights, and the choice of a codec."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from mmoe import optional
from mmoe.errors import ConfigError, DataError, PackageError
from mmoe.tokenizers.audio import AudioConfig, MelCodec, MelConfig
from mmoe.tokenizers.audio_codecs import load_codec

LENGTHS = [1, 2, 39, 40, 41, 79, 80, 81, 159, 160, 161, 319, 320, 321, 500, 997, 1600, 2401]

TINY = {
    "encodec": lambda: EncodecModel(
        EncodecConfig(
            sampling_rate=8000,
            target_bandwidths=[1.0, 2.0],
            num_filters=4,
            num_lstm_layers=1,
            hidden_size=8,
            codebook_dim=8,
            codebook_size=32,
            upsampling_ratios=[5, 4, 2],
        )
    ),
    "dac": lambda: DacModel(
        DacConfig(
            sampling_rate=8000,
            encoder_hidden_size=4,
            decoder_hidden_size=32,
            downsampling_ratios=[2, 4, 5],
            n_codebooks=3,
            codebook_size=32,
        )
    ),
    "mimi": lambda: MimiModel(
        MimiConfig(
            sampling_rate=8000,
            hidden_size=16,
            num_filters=4,
            codebook_size=32,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=4,
            upsampling_ratios=[5, 4, 2],
            upsample_groups=16,
            num_hidden_layers=1,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, with codebooks that tell frames apart (untrained ones are all zeros)."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("codecs")
    for kind, build in TINY.items():
        model = build()
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
            elif name.endswith("embed"):
                buffer.copy_(model.encoder(torch.randn(1, 1, 32 * 40) * 0.3)[0].detach().T)
        model.save_pretrained(root / kind)
    return root


@pytest.fixture(params=sorted(TINY))
def codec(request, folders):
    return load_codec(AudioConfig(kind=request.param, path=str(folders / request.param)))


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(0, 0.3, samples).astype(np.float32)


def test_num_frames_is_what_encode_yields(codec):
    for rate in (8000, 11025, 16000):
        for samples in [0, *LENGTHS]:
            codes = codec.encode(noise(samples), rate)
            assert codes.shape == (codec.num_frames(samples, rate), 2)
            assert codes.dtype == np.int64 and ((codes >= 0) & (codes < codec.codebook_size)).all()
    samples = np.array(LENGTHS)
    assert codec.num_frames(samples, 8000).tolist() == [codec.num_frames(n, 8000) for n in LENGTHS]


def test_codes_are_those_of_the_model_itself(codec):
    wave = noise(20 * codec.hop)
    with torch.inference_mode():
        theirs = codec.model.encode(torch.from_numpy(wave)[None, None]).audio_codes
    ours = codec.encode(wave, 8000)
    theirs = theirs.reshape(-1, len(ours))[:2].T.numpy()  # EnCodec gives the levels of its lowest bandwidth, one
    assert (ours[:, : theirs.shape[1]] == theirs).all() and len(np.unique(ours)) > 4


def test_decoding_gives_whole_frames(codec):
    for samples in (0, 1, 500):
        codes = codec.encode(noise(samples), 8000)
        wave = codec.decode(codes)
        assert wave.dtype == np.float32 and len(wave) == len(codes) * codec.hop
        assert np.isfinite(wave).all()
    assert not np.array_equal(codec.decode(codes), codec.decode((codes + 1) % codec.codebook_size))


def test_fingerprints_tell_weights_and_levels_apart(codec, folders):
    kind = codec.kind
    path = str(folders / kind)
    assert load_codec(AudioConfig(kind=kind, path=path)).fingerprint == codec.fingerprint
    assert load_codec(AudioConfig(kind=kind, path=path, codebooks=1)).fingerprint != codec.fingerprint
    with torch.no_grad():
        next(codec.model.parameters()).add_(1)
    del codec.__dict__["fingerprint"]
    assert load_codec(AudioConfig(kind=kind, path=path)).fingerprint != codec.fingerprint


def test_more_levels_than_the_model_has(folders):
    with pytest.raises(ConfigError, match=r"has 3 levels.*tokenizers.audio.codebooks <= 3"):
        load_codec(AudioConfig(kind="dac", path=str(folders / "dac"), codebooks=9))


def test_a_missing_folder_and_another_model_are_named(folders, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/config.json does not exist.*nothing is downloaded"):
        load_codec(AudioConfig(kind="mimi", path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"describes a dac model, not mimi; set tokenizers.audio.kind"):
        load_codec(AudioConfig(kind="mimi", path=str(folders / "dac")))
    (tmp_path / "config.json").write_text((folders / "dac" / "config.json").read_text())
    with pytest.raises(DataError, match="cannot be loaded as a dac model"):
        load_codec(AudioConfig(kind="dac", path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_codec(AudioConfig(kind="dac", path=str(tmp_path)))


def test_weights_that_lack_tensors_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folders / "dac" / "config.json").read_text())
    tensors = load_file(folders / "dac" / "model.safetensors")
    tensors.pop("encoder.conv1.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 tensors of a dac model, such as encoder.conv1.weight"):
        load_codec(AudioConfig(kind="dac", path=str(tmp_path)))


def test_stereo_models_are_refused(folders, tmp_path):
    EncodecModel(EncodecConfig(**_settings(folders / "encodec") | {"audio_channels": 2})).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="mono"):
        load_codec(AudioConfig(kind="encodec", path=str(tmp_path)))


def test_without_transformers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    optional.status.cache_clear()
    try:
        with pytest.raises(PackageError, match=r"tokenizers.audio.kind asks for transformers.*\[codecs\]"):
            load_codec(AudioConfig(kind="dac", path=str(folders / "dac")))
    finally:
        optional.status.cache_clear()


def test_the_fitted_codec_is_loaded_and_its_settings_checked(tmp_path):
    path = str(tmp_path / "codec.safetensors")
    config = AudioConfig(path=path, codebooks=3, mel=MelConfig(codebook_size=8))
    fitted = MelCodec.fit([noise(8000)], config, seed=0)
    fitted.save(path)
    assert load_codec(config).fingerprint == fitted.fingerprint
    assert load_codec(AudioConfig(path=path, mel=config.mel)).codebooks == 2
    with pytest.raises(DataError, match=r"codebook_size 8 \(tokenizers.audio.mel.codebook_size is 64\)"):
        load_codec(AudioConfig(path=path))
    with pytest.raises(ConfigError, match="tokenizers.audio.path is not set"):
        load_codec(AudioConfig())


def _settings(folder) -> dict:
    settings = json.loads((folder / "config.json").read_text())
    return {key: settings[key] for key in ("sampling_rate", "num_filters", "hidden_size", "codebook_size")}
