//! The host's resolver settings: a file of the form of resolv.conf(5), followed as it changes.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vnet_proto::model::Name;

use crate::config::SEARCH_DOMAINS_MAX;

/// Where hosts keep it.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How often the file is looked at, at most.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes read of the file. A longer one is not a resolver's.
const FILE_BYTES_MAX: usize = 64 * 1024;
/// Search domains taken, and their bytes as a line: what resolvers of guests take (the classic limits of
/// resolv.conf(5), and macOS's).
const SEARCH_BYTES_MAX: usize = 256;
const DNS_PORT: u16 = 53;
/// Who is asked where the file is there and names nobody (resolv.conf(5)).
const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT);

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostResolver {
    /// Name servers, in order.
    pub servers: Vec<SocketAddr>,
    /// Domains tried for short names, in order.
    pub search_domains: Vec<Name>,
}

impl HostResolver {
    /// Reads the file. One that cannot be read, or is no file, says nothing.
    pub fn read(path: &Path) -> Self {
        Self::parse(&read_file(path).unwrap_or_default())
    }

    /// Reads the text. What is not understood is left out, as every resolver does.
    pub fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => found.servers.extend(words.next().and_then(server)),
                // The last such line counts.
                Some("search" | "domain") => {
                    found.search_domains = fitting(words.filter_map(|w| w.parse().ok()));
                }
                _ => {}
            }
        }
        found
    }
}

/// As many domains as guests' resolvers take.
fn fitting(domains: impl Iterator<Item = Name>) -> Vec<Name> {
    let mut room = SEARCH_BYTES_MAX + 1;
    let fits = |name: &Name| match room.checked_sub(name.as_str().len() + 1) {
        Some(left) => {
            room = left;
            true
        }
        None => false,
    };
    domains.take(SEARCH_DOMAINS_MAX).take_while(fits).collect()
}

/// The file's text. Opened without waiting: what is no file might never be written.
fn read_file(path: &Path) -> io::Result<String> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A name server's address, with a zone for a link-local one.
fn server(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(SocketAddr::new(address, DNS_PORT));
    }
    let (address, zone) = text.split_once('%')?;
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = zone
        .parse()
        .ok()
        .or_else(|| nix::net::if_::if_nametoindex(zone).ok())?;
    Some(SocketAddrV6::new(address, DNS_PORT, 0, scope).into())
}

/// What the file says, read again when it changed.
#[derive(Debug)]
pub struct ResolvConf {
    path: PathBuf,
    found: HostResolver,
    checked_at: Option<Instant>,
    stamp: Option<Stamp>,
}

/// What tells one file from another, and from itself when it was written to.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl ResolvConf {
    /// The file at a path, which need not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            found: HostResolver::default(),
            checked_at: None,
            stamp: None,
        }
    }

    /// What it says now, or said at most a second ago.
    pub fn now(&mut self) -> &HostResolver {
        let now = Instant::now();
        if self
            .checked_at
            .is_none_or(|at| now.duration_since(at) >= CHECK_INTERVAL)
        {
            self.checked_at = Some(now);
            self.check();
        }
        &self.found
    }

    /// Reads the file if it is another than the last time. A file that is gone or cannot be read for a moment,
    /// as while it is replaced, leaves all as it is.
    fn check(&mut self) {
        let Ok(metadata) = std::fs::metadata(&self.path) else {
            return;
        };
        let stamp = Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        };
        // Times of files are coarse: one that changed just now may change again without showing it.
        let age = metadata.modified().map(|at| at.elapsed().unwrap_or_default());
        let is_fresh = age.is_ok_and(|age| age < CHECK_INTERVAL * 2);
        if self.stamp.as_ref() == Some(&stamp) && !is_fresh {
            return;
        }
        let Ok(text) = read_file(&self.path) else { return };
        let mut found = HostResolver::parse(&text);
        if found.servers.is_empty() {
            // Written in place, it is empty before it is whole.
            if is_fresh && !self.found.servers.is_empty() {
                return;
            }
            found.servers.push(LOCAL);
        }
        (self.stamp, self.found) = (Some(stamp), found);
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn servers_and_search_domains_are_read_as_resolvers_do() {
        let found = HostResolver::parse(
            "# made by hand\ndomain old.test\nnameserver 127.0.0.53\n  nameserver\t2001:db8::53 ; second\n\
             nameserver fe80::1%3\nnameserver nonsense\nnameserver\noptions edns0 trust-ad\n\
             search Corp.Example.com. example.com bad..name\nsortlist 10.0.0.0\n",
        );
        let text: Vec<String> = found.servers.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["127.0.0.53:53", "[2001:db8::53]:53", "[fe80::1%3]:53"]);
        let domains: Vec<&str> = found.search_domains.iter().map(Name::as_str).collect();
        assert_eq!(domains, ["corp.example.com", "example.com"]);
    }

    #[test]
    fn search_domains_are_as_many_as_guests_take() {
        let line = |count: usize, bytes: usize| {
            let names = (0..count).map(|n| format!(" {n}.{}", "x".repeat(bytes)));
            HostResolver::parse(&format!("search{}\n", names.collect::<String>()))
                .search_domains
                .len()
        };
        assert_eq!(line(6, 10), 6);
        assert_eq!(line(7, 10), 6);
        assert_eq!(line(6, 60), 4, "4 of 62 bytes and 3 spaces are 251");
        assert_eq!(HostResolver::parse("search\n").search_domains, []);
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_missing_one_changes_nothing() {
        let directory = std::env::temp_dir().join(format!("vnet-resolv-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("resolv.conf");
        let mut conf = ResolvConf::new(path.clone());
        let look_later = |conf: &mut ResolvConf| {
            conf.checked_at = None;
            conf.now().servers.clone()
        };
        assert!(look_later(&mut conf).is_empty());
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert!(
            conf.now().servers.is_empty(),
            "not looked at more than once a second"
        );
        assert_eq!(look_later(&mut conf), ["192.0.2.1:53".parse().unwrap()]);
        std::fs::write(&path, "nameserver 192.0.2.2\n").unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.2:53".parse().unwrap()]);
        // Emptied, as it is for a moment while it is written in place; then whole again, of the same size.
        std::fs::write(&path, "").unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.2:53".parse().unwrap()]);
        std::fs::write(&path, "nameserver 192.0.2.3\n").unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.3:53".parse().unwrap()]);
        // Replaced by one that is as old and as long as the one before.
        let long_ago = SystemTime::now() - Duration::from_secs(3_600);
        let set_time = |path: &Path| {
            std::fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(long_ago)
                .unwrap();
        };
        set_time(&path);
        assert_eq!(look_later(&mut conf), ["192.0.2.3:53".parse().unwrap()]);
        let next = directory.join("next");
        std::fs::write(&next, "nameserver 192.0.2.4\n").unwrap();
        set_time(&next);
        std::fs::rename(&next, &path).unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.4:53".parse().unwrap()]);
        // What is no file is not waited for, and changes nothing; nor does none.
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.4:53".parse().unwrap()]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.4:53".parse().unwrap()]);
        // A file that names nobody, and is not just being written, is the host's own server.
        std::fs::write(&path, "search lab.test\n").unwrap();
        set_time(&path);
        assert_eq!(look_later(&mut conf), ["127.0.0.1:53".parse().unwrap()]);
        assert_eq!(conf.now().search_domains, ["lab.test".parse().unwrap()]);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
