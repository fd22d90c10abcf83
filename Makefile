# Every target is a short call; what it does is in lab/iot_lab (the lab) and tests/run (the tests).
# Variables reach those through the environment: make lab OFFICIAL=1.

SHELL := /bin/bash
LAB := lab/bin/lab
PLAYBOOK = cd ansible && ../.lab/venv/tools/bin/ansible-playbook -i ../inventory/$(TOPOLOGY)
export TOPOLOGY ?= couchdb

.DEFAULT_GOAL := help
.PHONY: help lab demo test unit integration lint audit dead-letters health bench drill backup restore \
        lab-check lab-status lab-report lab-ssh \
        lab-destroy train lock clean

help: ## List these targets
	@echo "Usage: make TARGET [VARIABLE=VALUE]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Start with 'make lab' (four hosts, needs root), or 'make demo' (plain processes)."

lab: ## Boot, converge and verify the hosts; OFFICIAL=1, DATASET=PATH, PROFILE=1: see README
	@$(LAB) up

demo: ## The same apps, broker and database as plain processes, no hosts; ARGS=--help
	@$(LAB) demo $(ARGS)

test: ## All tests: lint, unit, integration, and the molecule scenario on four hosts
	@$(LAB) setup test
	@tests/run

unit: ## Unit tests
	@$(LAB) setup test
	@tests/run unit

integration: ## The apps against a real broker and a real database
	@$(LAB) setup test
	@tests/run integration

lint: ## Linters and type checks
	@$(LAB) setup test
	@tests/run lint

audit: ## Is every image stored and predicted, once? Asks the storage host; ARGS=--json
	@$(LAB) audit $(ARGS)

dead-letters: ## Records that were set aside, asked of the storage host: ARGS=list, "replay --reason R" …
	@$(LAB) dead-letters $(ARGS)

health: ## What is wrong? Hosts, services, brokers, lag, disks; ARGS=--json; its own exit status: lab/bin/lab health
	@$(LAB) health $(ARGS)

bench: ## Measure the pipeline on the running lab, about half an hour; ARGS=--help
	@$(LAB) bench $(ARGS)

drill: ## Break the running lab while images flow, and audit: NAME=short, all or one; without, list them
	@$(LAB) drill $(NAME) $(ARGS)

backup: ## Back up the running lab's database to backups/, and prove it by restoring; ARGS="-e backup_keep=7"
	@$(PLAYBOOK) playbooks/backup.yml $(ARGS)

restore: ## Merge a backup into the running lab's database: FILE=backups/…; ARGS=--check only tells
	@$(PLAYBOOK) playbooks/restore.yml \
	    -e backup="$(abspath $(or $(FILE),$(error name a backup: make restore FILE=backups/…)))" $(ARGS)

lab-check: ## Can this machine run the hosts? Says what is missing
	@$(LAB) check

lab-status: ## Hosts and services
	@$(LAB) status

lab-report: ## Hosts, services, topics, images and accuracy: what make lab prints at its end
	@$(LAB) report

lab-ssh: ## A shell on a host: HOST=storage; ARGS="COMMAND" runs that instead
	@$(LAB) ssh $(or $(HOST),$(error name a host: make lab-ssh HOST=storage)) $(ARGS)

lab-destroy: ## Remove hosts, network and secrets; downloads and images stay for the next time
	@$(LAB) destroy

train: ## Train the model: DATA=PATH VAL=PATH, and WIDTH, EPOCHS as wanted; ARGS=--help
	@$(LAB) setup train
	@.lab/venv/apps/bin/python apps/training/train.py $(if $(DATA),--data "$(DATA)") \
	    $(if $(VAL),--val "$(VAL)") $(if $(WIDTH),--width $(WIDTH)) \
	    $(if $(EPOCHS),--epochs $(EPOCHS)) $(ARGS)

lock: ## Renew the hash-locked requirements of tools and apps
	@$(LAB) lock

clean: ## Remove everything that was made here, hosts and images included
	@$(LAB) clean
