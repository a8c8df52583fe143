# Delegates to bootstrap.py, which works without make. `make bench NAME=gpu ARGS=--toy` runs one measurement.
.PHONY: demo test check bench soak
demo test check bench soak:
	@python3 bootstrap.py $@ $(if $(filter bench,$@),$(NAME) $(ARGS))
