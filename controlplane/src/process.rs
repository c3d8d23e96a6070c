//! Whether a process that was there once still is: a number alone may be another's by now.
//!
//! Linux alone tells it (proc(5)). What cannot be told has not ended.

/// A process, unlike every other of any start of this machine: the start, the PID namespace that its number is of, that
/// number, and when it began. Empty where that cannot be told.
#[must_use]
pub fn mark(pid: i32) -> String {
    #[cfg(target_os = "linux")]
    return linux::mark(pid).unwrap_or_default();
    #[cfg(not(target_os = "linux"))]
    {
        let _ = pid;
        String::new()
    }
}

/// Whether a process has ended for sure.
#[must_use]
pub fn has_ended(mark: &str) -> bool {
    #[cfg(target_os = "linux")]
    return linux::has_ended(mark).unwrap_or(false);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = mark;
        false
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs;

    use nix::errno::Errno;
    use nix::sys::signal::kill;
    use nix::unistd::Pid;

    pub(super) fn mark(pid: i32) -> Option<String> {
        // Zero: it is outside this PID namespace.
        let began = (pid > 0).then(|| stat(pid)).flatten()?.1;
        Some(format!("{} {} {pid} {began}", machine()?, namespace()?))
    }

    pub(super) fn has_ended(mark: &str) -> Option<bool> {
        let mut parts = mark.split(' ');
        let (machine_then, namespace_then) = (parts.next()?, parts.next()?);
        let pid: i32 = parts.next()?.parse().ok().filter(|pid| *pid > 0)?;
        let began: u64 = parts.next()?.parse().ok()?;
        if machine_then != machine()? {
            return Some(true);
        }
        if namespace_then != namespace()? {
            return None;
        }
        if kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) {
            return Some(true);
        }
        // Not there for others to look at under hidepid, which is no end.
        let (state, now) = stat(pid)?;
        Some(now != began || matches!(state, 'Z' | 'X'))
    }

    /// This start of the machine.
    fn machine() -> Option<String> {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned()).filter(|id| !id.is_empty() && !id.contains(' '))
    }

    fn namespace() -> Option<String> {
        fs::read_link("/proc/self/ns/pid")
            .ok()?
            .into_os_string()
            .into_string()
            .ok()
    }

    /// A process's state, and when it began, in ticks since the machine did.
    fn stat(pid: i32) -> Option<(char, u64)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Its name comes before, in parentheses, and may have anything in it.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some((state, fields.nth(BEGAN_AFTER_STATE)?.parse().ok()?))
    }

    /// `starttime` is the twenty-second field, the state the third.
    const BEGAN_AFTER_STATE: usize = 18;
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_has_ended_when_it_is_known_to_have() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let there = mark(pid);
        assert!(!there.is_empty() && !has_ended(&there), "{there}");
        // The number is another's, or the machine was started anew.
        let parts: Vec<&str> = there.split(' ').collect();
        let [machine, namespace, pid, began] = parts[..] else {
            panic!("{there}")
        };
        assert!(has_ended(&format!("{machine} {namespace} {pid} {began}0")));
        assert!(has_ended(&format!("0-0 {namespace} {pid} {began}")));
        // What its number is of cannot be told.
        assert!(!has_ended(&format!("{machine} pid:[1] {pid} {began}0")));
        for bad in ["", "a", "a b c d", &format!("0-0 {namespace} -1 {began}")] {
            assert!(!has_ended(bad), "{bad}");
        }
        child.kill().unwrap();
        // As long as nobody has asked how it ended, it has its number.
        while !has_ended(&there) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(has_ended(&there));
        assert_eq!((mark(0), mark(-1)), (String::new(), String::new()));
    }
}
