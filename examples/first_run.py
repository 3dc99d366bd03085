# %% [markdown]
# # A finished run, read from Python
#
# Run these cells from the top, in an editor that knows `# %%` (VS Code, PyCharm, Jupyter with jupytext), or all at
# once: `.venv/bin/python examples/first_run.py`. `make quickstart` makes the run that they read. Nothing here needs
# torch; the table of voices needs pandas.

# %%
from collections import Counter

import rlaif
from rlaif.console import visible  # a model's text can hold characters that steer a terminal; this shows them instead

run = rlaif.open_run("runs/quickstart")  # yours: the folder that `rlaif run` printed
print(run.job.policy.model, "trained by", run.job.learner.kind, "with a judge of kind", run.job.judge.kind)

# %% [markdown]
# ## What happened, iteration by iteration
# An iteration samples answers, pairs them, has them judged, keeps the pairs whose label can be trusted, and updates.

# %%
for m in run.iterations:
    share = "no pair" if m.kept_share is None else f"{m.kept_share:.0%}"
    print(
        f"{m.iteration + 1}: under {m.constitution}, kept {share} of {m.pairs} pairs, {m.sampled.mean_words:.0f} words"
    )

# %% [markdown]
# ## One pair, from the question to the decision
# The judge's votes on it, one for each voice, and what the filters made of them.

# %%
prompts = {p.id: p for p in run.prompts()}
answers = {c.id: c for c in run.completions()}
pair = next(run.pairs(iteration=0))
print("asked: ", visible(prompts[pair.prompt_id].text))
print("first: ", visible(answers[pair.first].text))
print("second:", visible(answers[pair.second].text))

for vote in run.votes(iteration=0):
    if vote.ballot.pair_id == pair.id:
        sure = "not told" if vote.p_first is None else f"{vote.p_first:.2f}"
        print(f"  {vote.model}, {vote.ballot.voice}, order {vote.ballot.order}: {vote.outcome}, p(first) {sure}")

decision = next(d for d in run.decisions(iteration=0) if d.pair_id == pair.id)
print(decision.status, "winner:", decision.winner, "reasons:", list(decision.reasons))

# %% [markdown]
# ## Why pairs were dropped
# Every rule that spoke against a pair is noted, so one pair can count for several.

# %%
decisions = list(run.decisions())
print(Counter(d.status for d in decisions))
print(Counter(reason for d in decisions for reason in d.reasons))

# %% [markdown]
# ## Which voices agree with the verdict
# As a data frame: a column for each field, nested ones by their path. A voice that seldom agrees is worth a look.

# %%
votes = run.frame("votes")
verdicts = {d.pair_id: d.verdict.outcome for d in decisions}
votes["agrees"] = votes["outcome"] == votes["ballot.pair_id"].map(verdicts)
print(votes.groupby("ballot.voice")["agrees"].agg(["mean", "count"]).round(2))

# %% [markdown]
# ## What went into the weights
# Exactly these rows trained, in these steps.

# %%
for preference in list(run.preferences())[:3]:
    agreed = "" if preference.agreement is None else f", agreement {preference.agreement:.2f}"
    print(f"{preference.source}{agreed}")
    print("  chosen:  ", visible(preference.chosen)[:100])
    print("  rejected:", visible(preference.rejected)[:100])
for step in run.steps():
    print(f"step {step.step} of iteration {step.iteration + 1}: {len(step.row_ids)} pairs, loss {step.loss:.3f}")

# %% [markdown]
# ## Did it help?
# Held-out questions never train. The win rate is against the base policy's answers, by voices that never voted on what
# trained. An interval that holds one half has shown nothing.

# %%
for e in run.evaluations:
    against = f", win rate {e.win_rate:.2f} ({e.win_interval[0]:.2f}-{e.win_interval[1]:.2f})" if e.win_interval else ""
    print(f"after {e.updates}: {e.mean_words:.0f} words, {e.ended_share:.0%} ended by themselves{against}")

first, last = run.evaluations[0].updates, run.evaluations[-1].updates
before = next(run.completions(iteration=first, held_out=True))
after = next(c for c in run.completions(iteration=last, held_out=True) if c.prompt_id == before.prompt_id)
print("before:", visible(before.text))
print("after: ", visible(after.text))

# %% [markdown]
# ## A picture

# %%
import matplotlib.pyplot as plt  # noqa: E402 - imported where a cell needs it

figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
numbers = [m.iteration + 1 for m in run.iterations]
axes[0].plot(numbers, [m.kept_share for m in run.iterations], "o-")
axes[0].set(title="share of pairs kept", xlabel="iteration", ylim=(0, 1))
axes[1].plot(numbers, [m.sampled.mean_words for m in run.iterations], "o-")
axes[1].set(title="words of an answer", xlabel="iteration")
plt.show()

# %% [markdown]
# ## Where to go from here
# - `rlaif view runs/quickstart`: the same in a browser, every pair with an address.
# - `rlaif audit runs/quickstart show PAIR`: a pair rule by rule. `... sql "SELECT ..."`: any question.
# - `rlaif audit runs/quickstart replay --set filters.min_agreement=0.8`: what other filters would have kept.
# - `docs/python.md`: run a job and ask a judge from Python. `docs/run-directory.md`: what each field is.
