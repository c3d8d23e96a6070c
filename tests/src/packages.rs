//! What the tests use of the system, and the Debian packages that bring it.

use std::path::Path;

/// Programs and their packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("curl", "curl"),
    ("dhclient", "isc-dhcp-client"),
    ("dig", "bind9-dnsutils"),
    ("getent", "libc-bin"),
    ("git", "git"),
    ("iperf3", "iperf3"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("less", "less"),
    ("openssl", "openssl"),
    ("ping", "iputils-ping"),
    ("python3", "python3"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("setpriv", "util-linux"),
    ("setsid", "util-linux"),
    ("socat", "socat"),
    ("ssh", "openssh-client"),
    ("ssh-keygen", "openssh-client"),
    ("sshd", "openssh-server"),
    ("tshark", "tshark"),
];

/// Fails with one message if anything is missing.
///
/// # Panics
/// With the packages to install.
pub fn check() {
    let missing: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, _)| !is_installed(program))
        .collect();
    if missing.is_empty() {
        return;
    }
    let programs: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    panic!(
        "these tests need {}; run: apt-get install -y {}",
        programs.join(", "),
        packages.join(" ")
    );
}

fn is_installed(program: &str) -> bool {
    // What an ordinary user's PATH leaves out is found too.
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|directory| Path::new(directory).join(program).is_file())
}
