//! Lists of names and prefixes from files: plain, hosts, AdBlock and dnsmasq formats.
//!
//! A line that is not of the list's format is refused, never guessed. What such a file holds may be
//! anybody's business: messages name the file and the line and never quote it. Files are opened by
//! others; here there is only text, in [`Attachments`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ipnet::IpNet;
use vnet_proto::model::{NamePattern, parse_prefix};

use crate::policy::names::NameTable;
use crate::policy::prefixes::PrefixTable;
use crate::policy::{PolicyError, PolicyErrors};

/// Bytes that all lists of a policy may have together.
pub const LISTS_BYTES_MAX: usize = 64 << 20;

/// Entries that one list from a file may have.
pub const LIST_ENTRIES_MAX: usize = 2_000_000;

/// Lines of a list that are told one by one.
const PROBLEMS_MAX: usize = 20;

/// How the lines of a list are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ListFormat {
    /// That of its first line that is not a comment.
    #[default]
    Auto,
    /// A name, `*.name`, address or prefix on each line.
    Plain,
    /// `0.0.0.0 name name`.
    Hosts,
    /// `||name^`: the name and all below it.
    Adblock,
    /// `server=/name/`, `address=/name/` or `local=/name/`: the name and all below it.
    Dnsmasq,
}

impl ListFormat {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Plain, Self::Hosts, Self::Adblock, Self::Dnsmasq, Self::Auto];
}

impl fmt::Display for ListFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Plain => "plain",
            Self::Hosts => "hosts",
            Self::Adblock => "adblock",
            Self::Dnsmasq => "dnsmasq",
        })
    }
}

/// A list, read.
#[derive(Debug, Default)]
pub struct List {
    /// Its names.
    pub names: Arc<NameTable>,
    /// Its prefixes.
    pub prefixes: Arc<PrefixTable>,
}

impl List {
    /// Reads a list. `source` is its path, for messages.
    ///
    /// # Errors
    /// Each line that is not of the format, by its number alone.
    pub fn parse(source: &str, format: ListFormat, content: &[u8]) -> Result<Self, PolicyErrors> {
        let mut reading = Reading {
            source,
            format,
            names: NameTable::default(),
            prefixes: Vec::new(),
            entries: 0,
            problems: Vec::new(),
        };
        // The mark that some editors put before UTF-8.
        let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        for (line, number) in content.split(|byte| *byte == b'\n').zip(1u32..) {
            let read = match std::str::from_utf8(line) {
                Ok(text) => reading.line(text.trim()),
                Err(_) => Err("is not UTF-8 text"),
            };
            if let Err(found) = read {
                reading.problem(number, found);
            }
            if reading.problems.len() >= PROBLEMS_MAX {
                break;
            }
            if reading.entries > LIST_ENTRIES_MAX {
                reading.problem(number, "is one entry more than a list may have; split the list");
                break;
            }
        }
        if reading.problems.is_empty() {
            Ok(Self {
                names: Arc::new(reading.names.shrunk()),
                prefixes: Arc::new(reading.prefixes.into_iter().collect()),
            })
        } else {
            Err(PolicyErrors(reading.problems))
        }
    }
}

struct Reading<'a> {
    source: &'a str,
    format: ListFormat,
    names: NameTable,
    prefixes: Vec<IpNet>,
    entries: usize,
    problems: Vec<PolicyError>,
}

impl Reading<'_> {
    fn problem(&mut self, line: u32, found: &str) {
        self.problems.push(PolicyError {
            source_name: self.source.to_owned(),
            line,
            column: 1,
            text: format!("the line {found}"),
        });
    }

    fn line(&mut self, line: &str) -> Result<(), &'static str> {
        let line = without_comment(line);
        if line.is_empty() {
            return Ok(());
        }
        if line.starts_with('!') || line.starts_with("[Adblock") {
            // AdBlock's comment, and its first line.
            return match self.format {
                ListFormat::Auto => {
                    self.format = ListFormat::Adblock;
                    Ok(())
                }
                ListFormat::Adblock => Ok(()),
                ListFormat::Plain | ListFormat::Hosts | ListFormat::Dnsmasq => self.refuse(),
            };
        }
        if self.format == ListFormat::Auto {
            self.format = format_of(line);
        }
        match self.format {
            ListFormat::Plain | ListFormat::Auto => self.plain(line),
            ListFormat::Hosts => self.hosts(line),
            ListFormat::Adblock => self.adblock(line),
            ListFormat::Dnsmasq => self.dnsmasq(line),
        }
    }

    fn refuse(&self) -> Result<(), &'static str> {
        Err(match self.format {
            ListFormat::Plain | ListFormat::Auto => {
                "is not plain (expected a name, *.name, an address or a prefix, and nothing else)"
            }
            ListFormat::Hosts => "is not in hosts format (expected 0.0.0.0, 127.0.0.1, :: or ::1, and names)",
            ListFormat::Adblock => "is not ||name^, the one form of AdBlock that says only a name",
            ListFormat::Dnsmasq => {
                "is not server=/name/, address=/name/ or local=/name/ (an address that blocks may follow)"
            }
        })
    }

    fn plain(&mut self, line: &str) -> Result<(), &'static str> {
        if let Ok(pattern) = NamePattern::from_str(line) {
            return self.add(&pattern);
        }
        let prefix = parse_prefix(line).or_else(|_| self.refuse().map(|()| IpNet::default()))?;
        self.prefixes.push(prefix);
        self.entries += 1;
        Ok(())
    }

    fn hosts(&mut self, line: &str) -> Result<(), &'static str> {
        let mut fields = line.split_ascii_whitespace();
        let address = fields.next().unwrap_or_default();
        // As `fe80::1%lo0`.
        let bare = address.split('%').next().unwrap_or_default();
        let Ok(address) = bare.parse::<IpAddr>() else {
            return self.refuse();
        };
        let mut any = false;
        for name in fields {
            any = true;
            if OF_THE_SYSTEM.contains(&name) {
                continue;
            }
            if !(address.is_unspecified() || address.is_loopback()) {
                return self.refuse();
            }
            match NamePattern::from_str(name) {
                Ok(pattern @ NamePattern::Exact(_)) => self.add(&pattern)?,
                Ok(NamePattern::Subdomains(_)) | Err(_) => return self.refuse(),
            }
        }
        if any { Ok(()) } else { self.refuse() }
    }

    fn adblock(&mut self, line: &str) -> Result<(), &'static str> {
        let name = line.strip_prefix("||").and_then(|rest| rest.strip_suffix('^'));
        match name.map(NamePattern::from_str) {
            Some(Ok(NamePattern::Exact(name))) => self.add_with_all_below(name),
            Some(Ok(NamePattern::Subdomains(_)) | Err(_)) | None => self.refuse(),
        }
    }

    fn dnsmasq(&mut self, line: &str) -> Result<(), &'static str> {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let key = key.trim_end();
        if !matches!(key, "server" | "address" | "local") {
            return self.refuse();
        }
        let inside = value.trim_start().strip_prefix('/');
        let Some((names, target)) = inside.and_then(|inside| inside.rsplit_once('/')) else {
            return self.refuse();
        };
        let blocks = target
            .parse::<IpAddr>()
            .is_ok_and(|a| a.is_unspecified() || a.is_loopback());
        if !(target.is_empty() || key == "address" && (blocks || target == "#")) {
            return self.refuse();
        }
        for name in names.split('/') {
            match NamePattern::from_str(name) {
                Ok(NamePattern::Exact(name)) => self.add_with_all_below(name)?,
                Ok(NamePattern::Subdomains(_)) | Err(_) => return self.refuse(),
            }
        }
        Ok(())
    }

    fn add_with_all_below(&mut self, name: vnet_proto::model::Name) -> Result<(), &'static str> {
        self.add(&NamePattern::Exact(name.clone()))?;
        self.entries -= 1;
        self.add(&NamePattern::Subdomains(name))
    }

    fn add(&mut self, pattern: &NamePattern) -> Result<(), &'static str> {
        self.entries += 1;
        if self.names.insert(pattern) {
            Ok(())
        } else {
            Err("is one name more than a list may have; split the list")
        }
    }
}

/// What a hosts file says of the system itself; no name of a list.
const OF_THE_SYSTEM: [&str; 12] = [
    "localhost",
    "localhost.localdomain",
    "local",
    "broadcasthost",
    "ip6-localhost",
    "ip6-loopback",
    "ip6-localnet",
    "ip6-mcastprefix",
    "ip6-allnodes",
    "ip6-allrouters",
    "ip6-allhosts",
    "0.0.0.0",
];

/// `#` begins a comment at the line's start, or after a blank. AdBlock's `##` and `#@#` are none.
fn without_comment(line: &str) -> &str {
    let mut from = 0;
    while let Some(at) = line[from..].find('#').map(|at| from + at) {
        let after = line[at + 1..].chars().next();
        let comment = if at == 0 {
            !matches!(after, Some('#' | '@' | '?' | '$' | '%')) || line.bytes().all(|b| b == b'#')
        } else {
            line[..at].ends_with(char::is_whitespace)
        };
        if comment {
            return line[..at].trim_end();
        }
        from = at + 1;
    }
    line
}

fn format_of(line: &str) -> ListFormat {
    if line.starts_with("||") {
        ListFormat::Adblock
    } else if ["server=", "address=", "local="]
        .iter()
        .any(|key| line.starts_with(key))
    {
        ListFormat::Dnsmasq
    } else if line.contains(char::is_whitespace) {
        ListFormat::Hosts
    } else {
        ListFormat::Plain
    }
}

/// A list that came along with a document.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// The SHA-256 of its content, as lower-case hexadecimal digits.
    pub digest: String,
    /// The file's content.
    pub content: Arc<[u8]>,
}

/// The lists that came along with a document, by their paths as the document writes them.
#[derive(Debug, Clone, Default)]
pub struct Attachments(pub BTreeMap<String, Attachment>);

/// Lists that were read and are still in use, so that many VMs and revisions share one.
#[derive(Debug, Default)]
pub struct ListCache {
    lists: Mutex<HashMap<(String, ListFormat), Weak<List>>>,
}

impl ListCache {
    /// Reads a list, or gives the one that was read before.
    pub(crate) fn list(
        &self,
        path: &str,
        format: ListFormat,
        attachment: &Attachment,
    ) -> Result<Arc<List>, PolicyErrors> {
        let key = (attachment.digest.clone(), format);
        let lists = || self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = lists().get(&key).and_then(Weak::upgrade) {
            return Ok(list);
        }
        // Read without the lock: a long list delays nobody who needs another.
        let list = Arc::new(List::parse(path, format, &attachment.content)?);
        let mut lists = lists();
        lists.retain(|_, list| list.strong_count() > 0);
        lists.insert(key, Arc::downgrade(&list));
        Ok(list)
    }
}

/// What is wrong where a document names a list that did not come along.
pub(crate) fn missing(path: &str) -> String {
    format!(
        "list {path:?} did not come with the policy, and the controlplane opens no file; apply it with \
         vnetctl policy apply FILE, which sends the lists along"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &List) -> Vec<String> {
        let mut names: Vec<String> = list.names.patterns().map(|p| p.to_string()).collect();
        names.sort();
        names
    }

    fn read(format: ListFormat, text: &str) -> List {
        List::parse("l.txt", format, text.as_bytes()).unwrap_or_else(|errors| panic!("{errors}"))
    }

    #[track_caller]
    fn refused(format: ListFormat, line: &str) {
        let text = format!("# one\n\n{line}\n");
        let errors = List::parse("l.txt", format, text.as_bytes()).unwrap_err();
        let told = errors.to_string();
        assert!(told.starts_with("l.txt:3:1: the line "), "{line}: {told}");
        for word in line.split(|c: char| !c.is_alphanumeric()).filter(|w| w.len() > 5) {
            let known = ["address", "server", "local"].contains(&word);
            assert!(known || !told.contains(word), "{told} quotes {line}");
        }
    }

    #[test]
    fn each_format_gives_its_names() {
        let plain = read(
            ListFormat::Plain,
            "# a comment\nA.Example.\n*.b.example # why\r\n192.0.2.0/24\n2001:db8::1\n\nbücher.example\n",
        );
        assert_eq!(
            names(&plain),
            ["*.b.example", "a.example", "xn--bcher-kva.example"]
        );
        let prefixes: Vec<String> = plain
            .prefixes
            .as_slice()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(prefixes, ["192.0.2.0/24", "2001:db8::1/128"]);

        let hosts = "127.0.0.1 localhost\n255.255.255.255\tbroadcasthost\nfe80::1%lo0 localhost\n\
                     0.0.0.0 0.0.0.0\n0.0.0.0 ads.example  track.example # both\n::1 six.example\n";
        assert_eq!(
            names(&read(ListFormat::Hosts, hosts)),
            ["ads.example", "six.example", "track.example"]
        );

        let adblock = "[Adblock Plus 2.0]\n! Title: x\n||ads.example^\n";
        assert_eq!(
            names(&read(ListFormat::Adblock, adblock)),
            ["*.ads.example", "ads.example"]
        );

        let dnsmasq = "server=/a.example/\nlocal=/b.example/\naddress=/c.example/d.example/0.0.0.0\naddress=/e.example/#\n";
        let expected: Vec<String> = ["a", "b", "c", "d", "e"]
            .iter()
            .map(|n| format!("{n}.example"))
            .collect();
        let found = names(&read(ListFormat::Dnsmasq, dnsmasq));
        assert_eq!(&found[5..], &expected[..]);
        assert_eq!(found.len(), 10);
    }

    #[test]
    fn auto_takes_the_format_of_the_first_entry_and_holds_to_it() {
        for text in [
            "a.example\nb.example\n",
            "# x\n0.0.0.0 a.example b.example\n",
            "! x\n||a.example^\n||b.example^\n",
            "server=/a.example/b.example/\n",
        ] {
            let list = read(ListFormat::Auto, text);
            assert!(names(&list).iter().any(|name| name == "b.example"), "{text}");
        }
        let mixed = List::parse("l.txt", ListFormat::Auto, b"a.example\n||b.example^\n").unwrap_err();
        assert!(
            mixed.to_string().starts_with("l.txt:2:1: the line is not plain"),
            "{mixed}"
        );
    }

    #[test]
    fn what_is_not_of_the_format_is_refused_by_line_and_never_quoted() {
        for line in [
            "secret.example another.example",
            "http://secret.example/",
            "secret.example:443",
            "secret_key=hunter22222",
            "*secret.example",
            "||secret.example^",
            "root:x:0:0:secretroot:/root",
            "10.0.0.1/8",
        ] {
            refused(ListFormat::Plain, line);
        }
        for line in [
            "10.2.3.4 secret.example",
            "secret.example",
            "0.0.0.0",
            "0.0.0.0 *.secret.example",
        ] {
            refused(ListFormat::Hosts, line);
        }
        for line in [
            "@@||secret.example^",
            "||secret.example^$third-party",
            "||secret.example/path^",
            "secret.example##.banner",
            "##.secret-banner",
            "/secretpattern/",
            "||*.secret.example^",
            "secret.example",
        ] {
            refused(ListFormat::Adblock, line);
        }
        for line in [
            "server=/secret.example/10.0.0.1",
            "address=/secret.example/10.0.0.1",
            "server=10.9.9.9",
            "conf-file=/etc/secrets",
            "address=//0.0.0.0",
        ] {
            refused(ListFormat::Dnsmasq, line);
        }
        let bytes = List::parse("l.txt", ListFormat::Auto, b"a.example\n\xff\xfe\n").unwrap_err();
        assert_eq!(bytes.to_string(), "l.txt:2:1: the line is not UTF-8 text");
    }

    #[test]
    fn a_list_of_refused_lines_is_told_in_part() {
        let errors =
            List::parse("l.txt", ListFormat::Plain, "not a name\n".repeat(1000).as_bytes()).unwrap_err();
        assert_eq!(errors.0.len(), PROBLEMS_MAX);
    }

    #[test]
    fn a_list_in_use_is_read_once() {
        let cache = ListCache::default();
        let attachment = Attachment {
            digest: "d".into(),
            content: b"a.example\n".as_slice().into(),
        };
        let first = cache.list("a", ListFormat::Plain, &attachment).unwrap();
        let again = cache.list("b", ListFormat::Plain, &attachment).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        drop((first, again));
        let other = Attachment {
            digest: "e".into(),
            ..attachment
        };
        let _kept = cache.list("c", ListFormat::Plain, &other).unwrap();
        assert_eq!(
            cache.lists.lock().unwrap().len(),
            1,
            "what nobody uses is forgotten"
        );
    }
}
