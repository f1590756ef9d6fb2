# Shared by the scripts of .deb and .rpm; build.py puts it into them.

systemd_runs() { [ -d /run/systemd/system ]; }

# Our units that have, or are about to have, an agent: the plain one and instances of the template.
running() {
    systemctl list-units --plain --no-legend --full --state=active,reloading,activating,deactivating \
        flow-agent.service 'flow-agent@*.service' 2>/dev/null | sed 's/ .*//'
}

# wait_until SECONDS COMMAND...: whether the command succeeded within them, however busy the machine is.
wait_until() {
    end=$(($(uptime_seconds) + $1))
    shift
    until "$@"; do
        [ "$(uptime_seconds)" -lt "$end" ] || return 1
        sleep 1
    done
}

uptime_seconds() { cut -d. -f1 /proc/uptime; }
