"""How a run has gone so far, for the manifest."""

from dataclasses import dataclass, field

from submission.plan.planner import Plan, Planner

# A change of the planned rounds by this share is worth a line in the log, and so much of the budget lies between two.
PLAN_CHANGE, PLAN_SPACING = 0.1, 0.02
# So much of the budget lies between two points of the progress that the manifest tells of, which bounds its length.
PROGRESS_SPACING = 0.005


@dataclass
class History:
    """The plans that were announced; images made and batch size at some moments (seconds of the budget); the moment
    from which on there was an image."""

    plans: list[dict[str, float]] = field(default_factory=list)
    progress: list[tuple[float, int, int]] = field(default_factory=list)
    first_image: float | None = None

    def made_images(self, elapsed: float) -> None:
        """Notes when the first image came."""
        if self.first_image is None:
            self.first_image = elapsed

    def note(self, planner: Planner) -> None:
        """Keeps how far generation is, unless that was kept a moment ago."""
        elapsed = planner.budget.elapsed
        if not self.progress or elapsed - self.progress[-1][0] >= PROGRESS_SPACING * planner.budget.seconds:
            self.progress.append((round(elapsed, 3), planner.total_images, planner.batch_size))

    def changed(self, planner: Planner, plan: Plan) -> float | None:
        """Keeps a plan that is new or noticeably different, and returns the rounds planned before it, 0 at first."""
        budget = planner.budget
        before, said = (self.plans[-1]["rounds"], self.plans[-1]["elapsed"]) if self.plans else (0.0, -budget.seconds)
        due = budget.elapsed - said > PLAN_SPACING * budget.seconds
        if not due or abs(plan.rounds - before) <= PLAN_CHANGE * before:
            return None
        self.plans.append(
            {
                "elapsed": round(budget.elapsed, 2),
                "rounds": plan.rounds,
                "ipc": plan.ipc,
                "batch_size": planner.batch_size,
                "images_per_second": round(planner.images_per_second, 2),
                "generate_seconds": round(plan.generate, 2),
                "finish_seconds": round(plan.reserve, 2),
                "crowding": round(planner.file_plan.cost.crowding, 2),
            }
        )
        return before

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        points = list(self.progress)  # the main thread may be adding to it
        return {
            "first_image_seconds": self.first_image and round(self.first_image, 2),
            "plans": list(self.plans),
            "progress": {
                name: [point[column] for point in points]
                for column, name in enumerate(("elapsed", "images", "batch_size"))
            },
        }
