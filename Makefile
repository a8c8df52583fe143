# Delegates to bootstrap.py, which works without make.
.PHONY: demo test check bench soak
demo test check bench soak:
	@python3 bootstrap.py $@
