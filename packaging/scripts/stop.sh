
# That no unit has a main process, as one that is between two starts.
agents_gone() {
    for unit in $units; do
        pid=$(systemctl show --property=MainPID --value "$unit")
        [ "${pid:-0}" = 0 ] || return 1
    done
}

# Ends every agent with its flow runs, within a minute. SIGQUIT goes straight to cancelling them, whatever [stop] says: a stop
# that waits for them, or one that leaves them to the next agent, is no use where there is to be none.
stop_running() {
    units=$(running)
    [ -z "$units" ] || end_runs
    for group in /sys/fs/cgroup/system.slice/flow-agent*.service /sys/fs/cgroup/system.slice/*/flow-agent@*.service; do
        if grep -q '^populated 1' "$group/cgroup.events" 2>/dev/null; then
            unit=${group##*/}
            echo "flow-agent: flow runs that $unit has left behind are not touched; see: systemd-cgls --unit $unit"
        fi
    done
}

end_runs() {
    for unit in $units; do
        status=$(systemctl show --property=StatusText --value "$unit")
        echo "flow-agent: stopping $unit${status:+ ($status)}; flow runs that have not ended are cancelled now"
        systemctl kill --kill-who=main --signal=QUIT "$unit" 2>/dev/null || true
    done
    if ! wait_until 44 agents_gone; then
        echo "flow-agent: some flow runs have not ended within 44 seconds; killing them"
        for unit in $units; do # to the agent, a second signal: kill, report for 5 s at most, go
            systemctl kill --kill-who=main --signal=TERM "$unit" 2>/dev/null || true
        done
    fi
    # Sends no signal to an agent that has said that it is stopping. Ends a wait for the next start, and Restart=always.
    systemctl --no-block stop $units || true
    if ! wait_until 10 agents_gone; then
        for unit in $units; do
            systemctl kill --kill-who=all --signal=KILL "$unit" 2>/dev/null || true
        done
        wait_until 5 agents_gone || true
    fi
}
