"""Runs the tests in two processes where there are two cores, because most tests keep one busy.

`pytest_runtestloop`, which conftest.py imports, stands in for pytest's own loop. The second process
is a fork of the first, made when the tests are collected. Each takes the next file of tests until
none is left, so that the fixtures of a file are made once, and those of the session once in each
process. The first one shows the reports of the second, as if the tests had run there, but no
warnings of it."""
import itertools, multiprocessing, os, queue

def pytest_runtestloop(session):
    option = session.config.option
    files = [list(tests) for _, tests in itertools.groupby(session.items, lambda test: test.path)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    # Chosen by marker: tests that need all cores, much memory or a GPU.
    alone = (option.markexpr or option.collectonly or option.usepdb or option.capture == "no"
             or session.testsfailed)
    if alone or cores < 2 or len(files) < 2:
        return None                             # pytest's own loop
    session.config._tmp_path_factory.getbasetemp()          # one folder for both
    fork = multiprocessing.get_context("fork")
    taken = fork.Value("i", 0)                  # the number of files that a process has taken
    reports = fork.Queue()
    second = fork.Process(target=second_process, args=(session, files, taken, reports))
    second.start()
    try:
        for _ in run_files(session, files, taken):
            show(session, reports)
        while second.is_alive():
            show(session, reports, seconds=0.2)
        show(session, reports, seconds=0.2)
    finally:
        second.terminate()                      # if it is still there
    if second.exitcode:
        raise RuntimeError(f"the second process of the tests ended with {second.exitcode}")
    return True

def run_files(session, files, taken):
    """Run files of tests, as long as there are any that no process has taken; yields after every
    test."""
    tests = take(files, taken)
    while tests:
        for test, following in itertools.pairwise(tests):
            run_test(session, test, following)
            yield
        next_tests = take(files, taken)         # now, since pytest keeps the fixtures that it needs
        run_test(session, tests[-1], next_tests[0] if next_tests else None)
        yield
        tests = next_tests

def take(files, taken):
    with taken.get_lock():
        i = taken.value
        taken.value += 1
    return files[i] if i < len(files) else []

def run_test(session, test, following):
    session.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
    stop_if_asked(session)

def stop_if_asked(session):
    """As pytest's own loop does, for example with `-x`."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)

def second_process(session, files, taken, reports):
    plugins = session.config.pluginmanager
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()             # into the files of the first process
    capture.start_global_capturing()
    plugins.unregister(name="terminalreporter")
    plugins.register(Sender(session.config, reports))
    try:
        for _ in run_files(session, files, taken):
            pass
    except (session.Failed, session.Interrupted):
        pass                                    # the first one stops when it has the reports

class Sender:
    """Sends what pytest's terminal would show to the first process."""

    def __init__(self, config, reports):
        self.config = config
        self.reports = reports

    def pytest_runtest_logstart(self, nodeid, location):
        self.reports.put(("start", (nodeid, location)))

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook.pytest_report_to_serializable
        self.reports.put(("report", hook(config=self.config, report=report)))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.reports.put(("finish", (nodeid, location)))

def show(session, reports, seconds=0.0):
    """Show what the second process has sent; waits for so long when there is nothing more."""
    config = session.config
    while True:
        try:
            kind, content = reports.get(timeout=seconds)
        except queue.Empty:
            break
        if kind == "start":
            config.hook.pytest_runtest_logstart(nodeid=content[0], location=content[1])
        elif kind == "finish":
            config.hook.pytest_runtest_logfinish(nodeid=content[0], location=content[1])
        else:
            report = config.hook.pytest_report_from_serializable(config=config, data=content)
            config.hook.pytest_runtest_logreport(report=report)
    stop_if_asked(session)
