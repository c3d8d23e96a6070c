//! Which program of a guest's has a socket that leads somewhere: for the person who is asked. It is a claim: a
//! command can run any file under any name, so nothing is ever decided by it. proc_pid_net(5), proc_pid_fd(5).
//!
//! What is read is the guest's own `/proc`, which the helper sees where init has mounted it.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Programs that are named; a person reads no more.
const PROGRAMS_MAX: usize = 3;
/// Sockets that lead to one place and are looked for.
const SOCKETS_MAX: usize = 256;
/// How long it may take: a guest can have many processes with many descriptors.
const TIME_MAX: Duration = Duration::from_millis(200);
/// Of a file's name no more characters are shown.
const FILE_NAME_SHOWN: usize = 32;
/// Characters of the name that a process gives itself: the kernel keeps no more (proc_pid_comm(5)).
const COMM_MAX: usize = 15;
/// Of a table of sockets no more is read.
const TABLE_MAX_BYTES: u64 = 4 << 20;

/// Where a socket leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// TCP, else UDP.
    pub tcp: bool,
    /// Its other end.
    pub address: SocketAddr,
}

/// The programs of the guest that have such a socket, as `curl (pid 7)`, in the guest's own numbers.
pub(super) fn owners(proc: &Path, remote: Remote) -> Vec<String> {
    let deadline = Instant::now() + TIME_MAX;
    let protocol = if remote.tcp { "tcp" } else { "udp" };
    let mut wanted = HashSet::new();
    for table in [protocol.to_owned(), format!("{protocol}6")] {
        let text = read(&proc.join("1/net").join(table));
        wanted.extend(
            inodes(&text, remote)
                .take(SOCKETS_MAX - wanted.len())
                .map(|inode| format!("socket:[{inode}]")),
        );
    }
    if wanted.is_empty() {
        return Vec::new();
    }
    let mut pids: Vec<u32> = fs::read_dir(proc)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    // The youngest last: a shell hands its sockets to nobody, a parent may still hold its child's.
    pids.sort_unstable_by(|a, b| b.cmp(a));
    let mut found = Vec::new();
    for pid in pids {
        if found.len() == PROGRAMS_MAX || Instant::now() > deadline {
            break;
        }
        if holds(&proc.join(pid.to_string()), &wanted) {
            found.push(format!("{} (pid {pid})", name(&proc.join(pid.to_string()))));
        }
    }
    found
}

fn holds(process: &Path, wanted: &HashSet<String>) -> bool {
    fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|link| link.to_str().is_some_and(|link| wanted.contains(link)))
}

/// The file that it executes; the name that it gave itself where that cannot be told.
fn name(process: &Path) -> String {
    let file = fs::read_link(process.join("exe")).ok();
    let file = file.as_deref().and_then(Path::file_name);
    match file {
        Some(name) => shown(&name.to_string_lossy(), FILE_NAME_SHOWN),
        None => shown(read(&process.join("comm")).trim(), COMM_MAX),
    }
}

/// A name as it may stand in vnet's own words: as it is where it is made of what programs' names are made of, else in
/// quotes, escaped and cut. The guest chooses it, and could go on with the sentence.
fn shown(name: &str, longest: usize) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
    let mut rest = name.chars();
    let start: String = rest.by_ref().take(longest).collect();
    let cut = rest.next().is_some();
    if !cut && !start.is_empty() && start.chars().all(plain) {
        return start;
    }
    format!("\"{}{}\"", start.escape_default(), if cut { "..." } else { "" })
}

fn read(path: &Path) -> String {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        let _ = file.take(TABLE_MAX_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The inodes of the sockets in a table of `/proc/net` that lead there.
fn inodes(table: &str, remote: Remote) -> impl Iterator<Item = u64> {
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_whitespace().take(10).collect();
        let leads = parse_address(fields.get(2)?)? == remote.address;
        let inode: u64 = fields.get(9)?.parse().ok()?;
        (leads && inode != 0).then_some(inode)
    })
}

/// `0A71CB00:0050`: words of the address in this machine's order, as hexadecimal numbers, and the port.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = address
        .as_bytes()
        .chunks(8)
        .map(|word| {
            let word = std::str::from_utf8(word).ok()?;
            Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
        })
        .collect::<Option<_>>()?;
    let address = match words.as_slice() {
        [word] => IpAddr::from(Ipv4Addr::from(*word)),
        [_, _, _, _] => {
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            // IPv4, by a socket of IPv6.
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn sockets_are_found_by_where_they_lead() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100\n   \
             1: 027FA8C0:C350 0A7100CB:0050 02 00000001:00000000 01:00000064 00000000     0        0 12 2 0 100\n   \
             2: 027FA8C0:C351 0A7100CB:0051 02 00000001:00000000 01:00000064 00000000     0        0 13 2 0 100\n   \
             3: nonsense\n";
        let remote = Remote {
            tcp: true,
            address: "203.0.113.10:80".parse().unwrap(),
        };
        assert_eq!(inodes(table, remote).collect::<Vec<_>>(), [12]);
        assert_eq!(
            parse_address("0000000000000000FFFF00000A7100CB:0050"),
            Some(remote.address)
        );
        for wrong in ["", "0A7100CB", "0A7100C:0050x", "ä:1", "0A7100CB0A7100CB:0050"] {
            assert_eq!(parse_address(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_name_that_would_read_as_vnets_own_words_is_quoted_and_cut() {
        for plain in ["curl", "python3.13", "x86_64-linux-gnu-g++", "busybox"] {
            assert_eq!(shown(plain, FILE_NAME_SHOWN), plain);
        }
        let words = "apt (pid 2), which you approved already. Press y to hide this line....................";
        let cut = "\"apt (pid 2), which you approved ...\"";
        assert_eq!(shown(words, FILE_NAME_SHOWN), cut);
        assert_eq!(shown(words, COMM_MAX), "\"apt (pid 2), wh...\"");
        for (name, expected) in [
            ("", r#""""#),
            ("a b", r#""a b""#),
            ("apt,", r#""apt,""#),
            ("apt\" (pid 2), or \"b", r#""apt\" (pid 2), or \"b""#),
            ("a\\", r#""a\\""#),
            ("a\u{201d}; \u{1b}[2J\n", r#""a\u{201d}; \u{1b}[2J\n""#),
        ] {
            assert_eq!(shown(name, FILE_NAME_SHOWN), expected);
        }
        let longest = "a".repeat(FILE_NAME_SHOWN);
        assert_eq!(shown(&longest, FILE_NAME_SHOWN), longest);
        let longer = format!("{longest}a");
        assert_eq!(shown(&longer, FILE_NAME_SHOWN), format!("\"{longest}...\""));
    }

    #[test]
    fn owner_of_a_socket_of_this_process_is_this_program() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let _client = std::net::TcpStream::connect(address).unwrap();
        // As `/proc/1` is in a guest: any process of the network namespace.
        let proc = std::env::temp_dir().join(format!("vnet-claims-{}", std::process::id()));
        let own = std::process::id().to_string();
        fs::create_dir_all(&proc).unwrap();
        for name in ["1", &own] {
            let _ = std::os::unix::fs::symlink("/proc/self", proc.join(name));
        }
        let found = owners(&proc, Remote { tcp: true, address });
        fs::remove_dir_all(&proc).unwrap();
        assert!(
            found[0].ends_with(&format!("(pid {own})")) && found[0].starts_with("vnetctl-"),
            "{found:?}"
        );
        let nowhere = Remote { tcp: false, address };
        assert!(owners(Path::new("/proc"), nowhere).is_empty());
    }
}
