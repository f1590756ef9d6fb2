
no_jobs() { [ -z "$(systemctl list-jobs --plain --no-legend $units 2>/dev/null | grep '^ *[0-9]')" ]; }

# A new agent for every one that runs. The old one sees that it is a restart and leaves its flow runs, and the new one takes
# them up ([stop] on_restart = "keep", the default). Other policies may take their time, for which nobody should wait here.
# A unit that is being stopped stays so: that is what try-restart is for.
restart_running() {
    units=$(running)
    [ -n "$units" ] || return 0
    for unit in $units; do
        systemctl --no-block try-restart "$unit" || true
    done
    if ! wait_until 60 no_jobs; then
        echo "flow-agent: the restart of" $units "takes its time; it goes on by itself (systemctl list-jobs)"
        return 0
    fi
    for unit in $units; do
        if systemctl --quiet is-active "$unit"; then
            echo "flow-agent: $unit is restarted; flow runs go on"
        else
            echo "flow-agent: $unit is not running; see: systemctl status $unit" >&2
        fi
    done
}
