"""What must hold in a run shard after every event (PROTOCOL F2, I2, I3, I6, I7, I12). For tests and simulation only: it scans
everything, and says which promise is broken where."""

# ruff: noqa: S101 - assertions are what `Machine.validate` promises to raise; nothing of the product rests on them.

from __future__ import annotations

from control_plane.core import inline
from control_plane.core.files import ATTEMPT_ARTIFACTS, RESULT, RUN_ARTIFACTS, checkpoint_number
from control_plane.core.model import AttemptState, RunState, TaskState
from control_plane.core.run import KEPT_CHANGES, KEPT_EVENTS, Run, holds
from control_plane.core.state import ShardState


def check(state: ShardState) -> None:
    """Raises AssertionError with the story."""
    for run in state.runs.values():
        if run.sealed:
            _columns(run)
            for task in range(len(run.tasks)):
                _graph(run, task)
                _attempts(run, task)
            _events(run)
            _files(run)
            assert (run.uid in state.final) == run.state.final, f"{run.uid}: list of final runs disagrees"
        else:
            assert run.uid in state.unsealed, f"{run.uid}: unsealed and not listed so"
    _indices(state)
    _lanes(state)
    _requests(state)


def _columns(run: Run) -> None:
    where = f"run {run.uid}"
    assert run.counts == [run.states.count(value) for value in range(len(TaskState) + 1)], f"{where}: counts by state"
    assert run.open == sum(run.counts[: TaskState.SUCCEEDED]), f"{where}: open tasks"
    assert run.accepted_total == sum(run.accepted) == run.counts[TaskState.SUCCEEDED], f"{where}: accepted results"
    assert run.result_bytes == sum(map(inline.weight, run.results.values())), f"{where}: bytes of results"
    assert not run.state.final or not (run.open or run.live or run.undecided), f"{where}: final with work left"


def _graph(run: Run, task: int) -> None:
    where = f"task {task} of run {run.uid}"
    state = TaskState(run.states[task])
    parents = [TaskState(run.states[parent]) for parent in run.tasks[task].parents]
    final = [parent for parent in parents if parent.final]
    assert run.waiting[task] == len(parents) - len(final), f"{where}: parents it waits for"
    failed = sum(p not in (TaskState.SUCCEEDED, TaskState.SKIPPED) for p in final)
    unsucceeded = sum(p is not TaskState.SUCCEEDED for p in final)
    assert (run.failed_parents[task], run.unsucceeded_parents[task]) == (failed, unsucceeded), f"{where}: parents' ends"
    if state in (TaskState.READY, TaskState.PLACED, TaskState.RUNNING, TaskState.SUCCEEDED, TaskState.FAILED):
        rule = run.tasks[task].spec.trigger
        met = not run.waiting[task] and holds(rule, failed, unsucceeded)
        assert met, f"I7 {where}: {state.name} before its parents"
    if state is TaskState.PENDING and not run.waiting[task]:
        assert run.state is not RunState.RUNNING or task in run.skippable, f"{where}: pending for ever"


def _attempts(run: Run, task: int) -> None:
    where = f"task {task} of run {run.uid}"
    state = TaskState(run.states[task])
    live = run.live.get(task, [])
    past = run.history.get(task, [])
    numbers = [attempt.id.n for attempt in past]
    assert numbers == sorted(set(numbers)), f"I1 {where}: attempt numbers do not rise"
    assert not numbers or numbers[-1] < run.next_n[task], f"I1 {where}: next number"
    assert len(live) <= 2, f"F2 {where}: {len(live)} live attempts"
    assert len(live) < 2 or live[-1].hedge, f"I2 {where}: two live attempts, the second is no hedge"
    assert all(a in past and a.state in (AttemptState.PLACED, AttemptState.RUNNING) for a in live), f"{where}: live set"
    assert bool(live or task in run.undecided) == (state in (TaskState.PLACED, TaskState.RUNNING)), (
        f"F2 {where}: {state.name} with {len(live)} live attempts"
    )
    assert run.accepted[task] == (state is TaskState.SUCCEEDED), f"I3 {where}: {run.accepted[task]} results accepted"
    succeeded = sum(attempt.state is AttemptState.SUCCEEDED for attempt in past)
    assert succeeded == run.accepted[task], f"I3 {where}: {succeeded} attempts succeeded"


def _files(run: Run) -> None:
    """F2: an artifact is published exactly with its attempt's accepted success; a checkpoint is of a task that goes on."""
    files = run.files
    if files is None:
        return
    where = f"run {run.uid}"
    assert files.total == sum(len(made.refs) for made in files.published.values()), f"{where}: number of artifacts"
    assert files.total <= RUN_ARTIFACTS, f"{where}: too many artifacts"
    for task, made in files.published.items():
        winner = next((a for a in run.history.get(task, ()) if a.state is AttemptState.SUCCEEDED), None)
        maker = (winner.id, winner.cluster) if winner else None
        assert maker == (made.attempt, made.cluster), f"F2 task {task} of {where}: artifacts of a loser {made.attempt}"
        names = {ref.name for ref in made.refs}
        assert len(names) == len(made.refs) <= ATTEMPT_ARTIFACTS, f"task {task} of {where}: names of artifacts"
        assert RESULT not in names or task not in run.results, f"task {task} of {where}: two results"
    for task, made in files.checkpoints.items():
        assert not TaskState(run.states[task]).final, f"task {task} of {where}: final, and keeps a checkpoint"
        attempt = made.attempt
        number = checkpoint_number(made.refs[0].name)
        assert number, f"task {task} of {where}: {made.refs[0].name} is no checkpoint"
        assert run.attempt(task, attempt.n) is None or files.saved(attempt) == number, f"{attempt}: last checkpoint"
    kept = {(task, a.id.n) for task, past in run.history.items() for a in past}
    assert kept >= files.carried.keys(), f"{where}: checkpoints of attempts that are not kept"


def _events(run: Run) -> None:
    numbers = [event.number for event in run.events]
    last = run.event_number
    assert numbers == list(range(last - len(numbers) + 1, last + 1)), f"I16 run {run.uid}: event numbers have gaps"
    assert run.changes == sum(len(event.tasks) for event in run.events), f"run {run.uid}: size of the event ring"
    assert len(numbers) <= KEPT_EVENTS, f"run {run.uid}: too many events kept"
    assert run.changes <= KEPT_CHANGES or len(numbers) == 1, f"run {run.uid}: too many changes kept"


def _indices(state: ShardState) -> None:
    live = {a.id: a for run in state.runs.values() for members in run.live.values() for a in members}
    indexed = {id_: a for here in state.live_on.values() for id_, a in here.items()}
    assert live == indexed, "I12 live attempts by cluster"
    assert all(a.cluster == cluster for cluster, here in state.live_on.items() for a in here.values()), (
        "cluster of live"
    )
    stops = {id_: a for run in state.runs.values() for id_, a in run.stops.items()}
    stops.update((id_, a) for kept in state.kept.values() for id_, a in kept.items())
    assert stops == {id_: a for here in state.stops_on.values() for id_, a in here.items()}, "F8 stops by cluster"
    held: dict[str, dict[str, int]] = {}
    for run in state.runs.values():
        members = {a.id: a for each in run.live.values() for a in each} | run.stops
        for attempt in members.values():
            here, key = held.setdefault(attempt.cluster, {}), run.lanes[attempt.id.task].key
            here[key] = here.get(key, 0) + 1
    assert held == {cluster: here for cluster, here in state.held.items() if here}, "C4 room held by cluster and group"
    counts: dict[str, int] = {}
    for run in state.runs.values():
        alive = sum(map(len, run.live.values()))
        if alive:
            counts[run.header.namespace] = counts.get(run.header.namespace, 0) + alive
    assert counts == state.live_in, "live attempts by namespace"
    named = {(run.header.namespace, run.header.run_id): uid for uid, run in state.runs.items() if run.sealed}
    assert named == state.names, "names of runs"
    listed = sorted(uid for uids in state.by_namespace.values() for uid in uids)
    assert listed == sorted(named.values()), "runs by namespace"


def _lanes(state: ShardState) -> None:
    waiting = dict.fromkeys(state.lanes, 0)
    timed = {(uid, task) for _, _, uid, task in state.timers} | set(state.review)
    for run in state.runs.values():
        for task in run.tickets:
            waiting[run.lanes[task].key] += 1
        if run.state is not RunState.RUNNING:
            assert not run.tickets, f"run {run.uid} is {run.state.name} and still waits for places"
            continue
        for task, value in enumerate(run.states):
            if value == TaskState.READY:
                assert task in run.tickets or (run.uid, task) in timed, (
                    f"task {task} of run {run.uid}: ready and forgotten"
                )
    assert waiting == {key: lane.count for key, lane in state.lanes.items()}, "counts of lanes"
    assert all(lane.users > 0 for lane in state.lanes.values()), "a lane without runs"


def _requests(state: ShardState) -> None:
    records, floor = state.requests.records, state.requests.floor
    assert state.requests.ids() == sorted(records), "O8 order of requests and their records differ"
    assert all(id_ > floor for id_ in records), "O8 a record lies at or below the request floor"
