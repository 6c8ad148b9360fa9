"""What a run tells about itself: metrics, rollouts, the report."""
