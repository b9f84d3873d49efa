"""The providers by name."""

from __future__ import annotations

import msgspec
import pytest

from batchstream.endpoints.providers import DEFAULT, PROVIDERS, find
from batchstream.errors import UsageError


def test_the_default_provider_is_shuttleai_as_documented() -> None:
    provider = find(DEFAULT)
    assert provider.name == "shuttleai"
    assert provider.base_url == "https://api.shuttleai.com/v1"
    assert provider.key_env == "SHUTTLEAI_API_KEY"
    assert provider.default_model == "shuttleai/auto"
    assert dict(provider.limits.plans) == {"free": 2, "basic": 10, "premium": 30, "scale": 80}
    assert provider.limits.rpm is None, "the plan is the user's: no limit may be guessed"


def test_the_contract_names_seven_providers() -> None:
    assert list(PROVIDERS) == ["shuttleai", "openai", "openrouter", "groq", "deepseek", "local", "sim"]


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=lambda provider: provider.name)
def test_a_remote_provider_has_https_and_a_key_variable_and_one_of_our_own_has_neither(provider) -> None:
    if provider.name in ("local", "sim"):
        assert provider.base_url is None
        assert provider.key_env is None
    else:
        assert provider.base_url.startswith("https://")
        assert not provider.base_url.endswith("/")
        assert provider.key_env.isupper()


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"got 'shutleai' \(did you mean 'shuttleai'\?\)"):
        find("shutleai")
    with pytest.raises(UsageError, match="--base-url") as refused:
        find("qwertz")
    assert "did you mean" not in str(refused.value)


def test_providers_cannot_be_changed_by_accident() -> None:
    with pytest.raises(AttributeError):
        find("sim").base_url = "https://elsewhere.example/v1"
    with pytest.raises(TypeError):
        PROVIDERS["other"] = find("sim")  # type: ignore[index]
    assert msgspec.structs.asdict(find("sim"))["name"] == "sim"
