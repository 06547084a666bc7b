"""The flags that all scripts share: recipes, help, and mistakes that end in one line."""
import importlib, runpy

import pytest
import torch

import common
import simclr
from conftest import METHODS, mistake, one_line, run

def parse(method, *args):
    return importlib.import_module(method).parse_args(list(args))

@pytest.mark.parametrize("args,words", [
    (["--data", "cifar11"], ["--data", "cifar11", "shapes, cifar10, stl10, cifar100"]),
    (["--data", ""], ["--data", "''"]),
    (["--data", "x" * 5000], ["--data", "xxx"]),
    (["--epochs", "0"], ["--epochs", "'0' is not in 1.."]),
    (["--batch-size", "many"], ["--batch-size", "whole number", "'many'"]),
    (["--lr", "-1"], ["--lr", "'-1' is not in 1e-30..1e+30"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "inf"], ["--lr", "'inf' is not in 1e-30..1e+30"]),
    (["--temperature", "0"], ["--temperature", "'0' is not in"]),
    (["--temperature", "1e-42"], ["--temperature", "'1e-42' is not in"]),
    (["--color-strength", "1e39"], ["--color-strength", "1e39"]),
    (["--seed", "-3"], ["--seed", "'-3'"]),
    (["--seed", "18446744073709551616"], ["--seed", "in 0..9223372036854775807"]),
    (["--min-scale", "2"], ["--min-scale", "in 0..1"]),
    (["--colour", "1"], ["--colour"]),
    (["--recipe", "large"], ["--recipe", "shapes"]),
])
def test_bad_flags_take_one_line(args, words):
    with pytest.raises(common.UserError) as e:
        simclr.parse_args(args)
    message = str(e.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message
    assert len(message) < 400

def test_a_mistake_ends_with_status_2():
    assert one_line(run("simclr.py", "--epochs", 0)).startswith("simclr.py: error: ")

def ended_by(error, capsys):
    """Status and standard error of a script whose work ends in `error`."""
    def main(*_):
        raise error

    with pytest.raises(SystemExit) as e:
        common.launch(main, lambda: None, resumes=False)
    return e.value.code, capsys.readouterr().err

@pytest.mark.parametrize("error,words", [
    (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), "not enough memory"),
    (TypeError('failed with error "Overflow when unpacking long"'), "not enough memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), "not enough memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
    (common.UserError("a name of\ntwo lines"), "a name of\\ntwo lines")])
def test_errors_that_end_in_one_line(error, words, capsys):
    status, told = ended_by(error, capsys)
    assert status == 2 and told.count("\n") == 1 and words in told

def test_an_error_in_a_process_that_reads_is_shown_as_it_is(capsys):
    error = RuntimeError("Caught ValueError in DataLoader worker process 0.")
    status, told = ended_by(error, capsys)
    assert status == 1 and "Traceback" in told and "--workers" not in told

@pytest.mark.parametrize("variables,words", [
    (dict(RANK="0"), "WORLD_SIZE expected"),
    (dict(RANK="0", WORLD_SIZE="2"), "MASTER_ADDR expected"),
    (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="http"), "http")])
def test_some_of_torchruns_variables_are_not_enough(variables, words, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(common.UserError, match=f"torchrun.*{words}"):
        common.start()

@pytest.mark.parametrize("name,value", [
    ("RANK", "abc"), ("RANK", ""), ("WORLD_SIZE", "x1"), ("LOCAL_RANK", "zero")])
def test_torchruns_variables_are_whole_numbers(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as e:
        runpy.run_path(common.__file__)
    told = capsys.readouterr().err
    assert e.value.code == 2 and told.count("\n") == 1 and f"error: {name}={value!r}" in told

def test_a_number_of_processes_alone_is_not_enough(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    with pytest.raises(common.UserError, match="torchrun.*RANK expected"):
        common.start()

def test_more_processes_than_gpus_is_told_by_the_first_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(common.UserError, match="there are only 1 GPUs"):
        common.start()

def test_an_unknown_network_names_the_known_ones(tmp_path):
    message = mistake(simclr, "--arch", "resnet51", "--output", tmp_path)
    assert "--arch resnet51" in message and "resnet10, resnet18, resnet34, resnet50" in message

@pytest.mark.parametrize("args,words", [
    (["--help"], ["resnet10x0.25", "12.0"]),
    (["--data", "cifar10", "--help"], ["resnet18)", "512"]),
    (["--recipe", "imagenet", "--help"], ["resnet50)", "4096", "1e-06"])])
def test_help_shows_the_recipe_in_force(args, words, capsys):
    with pytest.raises(SystemExit):
        simclr.parse_args(args)
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words)

def test_a_flag_wins_over_the_recipe():
    assert simclr.parse_args(["--recipe", "imagenet", "--lr", "7"]).lr == 7

@pytest.mark.parametrize("method", METHODS)
def test_scripts_have_at_most_30_flags_and_every_recipe_parses(method):
    script = importlib.import_module(method)
    flags = []
    add_argument = common.Parser.add_argument

    def counting(parser, *names, **options):
        if isinstance(parser, common.Parser):
            flags.append(names[0])
        return add_argument(parser, *names, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Parser, "add_argument", counting)
        script.parse_args([])
    flags.remove("-h")
    assert len(flags) <= 30 and len(set(flags)) == len(flags), flags
    for recipe in script.RECIPES:
        args = script.parse_args(["--recipe", recipe])
        assert vars(args).items() >= script.RECIPES[recipe].items()

@pytest.mark.parametrize("method", METHODS)
def test_a_batch_larger_than_the_data_names_one_that_fits(method, tmp_path):
    script = importlib.import_module(method)
    flags = ["--batch-size", 5120, "--output", tmp_path]
    if method in ("moco", "densecl", "image_mixture"):
        flags += ["--queue-size", 5120]
    message = mistake(script, *flags)
    assert "at most the 5000 that there are" in message
    assert "--batch-size 1024 fits" in message
