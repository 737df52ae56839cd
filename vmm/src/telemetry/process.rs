//! Metrics of the process, from `/proc/self`.

use std::fs;

use rackvisor_devices::metrics::{MetricSource, Sample, Value};

/// Threads, descriptors, memory and CPU time of this process.
pub struct ProcessMetrics;

impl MetricSource for ProcessMetrics {
    fn collect(&self, visit: &mut dyn FnMut(Sample)) {
        let mut show = |name, help, value: Option<Value>| {
            // What `/proc` does not tell is left out rather than shown as zero.
            if let Some(value) = value {
                visit(Sample { name, help, labels: Vec::new(), value });
            }
        };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let gauge = |key| Some(Value::Gauge(field(&status, key)? as f64));
        let bytes = |key| Some(Value::Gauge(field(&status, key)? as f64 * 1024.0));
        show("process_threads", "Threads of the process.", gauge("Threads:"));
        show("process_resident_memory_bytes", "Resident memory including guest RAM.", bytes("VmRSS:"));
        show("process_virtual_memory_bytes", "Address space.", bytes("VmSize:"));
        let descriptors = fs::read_dir("/proc/self/fd").ok().map(|dir| Value::Gauge(dir.count() as f64));
        show("process_open_fds", "Open file descriptors.", descriptors);
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        show("process_cpu_milliseconds", "CPU time of all threads.", cpu_milliseconds(&stat).map(Value::Counter));
    }
}

fn field(status: &str, key: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// User and system time are the 14th and 15th field, in ticks of 10 ms (proc(5)); the name in the second may hold spaces.
pub(super) fn cpu_milliseconds(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_a_name_with_spaces_and_parentheses() {
        let stat = "42 (a ) (b) S 1 1 1 0 -1 4194560 1 0 0 0 25 17 0 0 20 0 1 0 5 1 1";
        assert_eq!(cpu_milliseconds(stat), Some(420));
    }
}
