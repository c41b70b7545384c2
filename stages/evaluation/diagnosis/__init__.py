"""Why a served acceptance is low: changes to how a draft is run, the walks under them, and what their counts say."""
