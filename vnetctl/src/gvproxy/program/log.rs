//! The log, in the form that gvproxy's has, a line each: `time="…" level=info msg="…"`, with further fields behind.
//!
//! What the parts of this process say through `tracing` and what the dataplane says go through the same writer, to
//! stderr or to the file of `-log-file`. A line that cannot be written is lost, and ends nothing.

use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::geteuid;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::pid::of_a_pipe;
use crate::gvproxy::config::LogLevel;
use crate::gvproxy::seldom::Seldom;
use crate::output::text::safe;

/// The target of events that end the process: their level is gvproxy's `fatal`.
pub(super) const FATAL: &str = "fatal";

/// Opens the file of `-log-file`, emptied, for its owner alone where it is new. What stdout or stderr writes
/// to, as `/dev/stderr`, is used as it is: what else is written there stays.
///
/// # Errors
/// A link that [`is_planted`]; a pipe that nobody reads; else the system's.
pub(super) fn open(path: &Path) -> io::Result<File> {
    if let Some(stream) = own_stream(path) {
        return Ok(stream);
    }
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    // A pipe without a reader would be waited for.
    let open = |flags: OFlag| {
        let flags = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        options.clone().custom_flags(flags.bits()).open(path)
    };
    let file = match open(OFlag::O_NOFOLLOW) {
        // A link, as to another disk.
        Err(_) if path.is_symlink() => {
            let directory = path
                .parent()
                .filter(|directory| !directory.as_os_str().is_empty());
            let directory = fs::metadata(directory.unwrap_or(Path::new(".")))?;
            if is_planted(fs::symlink_metadata(path)?.uid(), &directory, geteuid().as_raw()) {
                let text = "it is a link that another user put where everybody may put one, and what it leads to would \
                            be emptied (name that, or another file)";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
            open(OFlag::empty())
        }
        opened => opened,
    };
    let file = file.map_err(of_a_pipe)?;
    // From here on a slow reader is waited for, as that of stderr is.
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    // Appending, so that nobody who empties it meanwhile leaves a hole in it.
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Ok(file)
}

/// Stdout or stderr, if that writes to what the path leads to.
fn own_stream(path: &Path) -> Option<File> {
    let there = fs::metadata(path).ok()?;
    let is_there = |own: &File| {
        own.metadata()
            .is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
    };
    let streams = [
        io::stderr().as_fd().try_clone_to_owned(),
        io::stdout().as_fd().try_clone_to_owned(),
    ];
    streams.into_iter().flatten().map(File::from).find(is_there)
}

/// Whether somebody else chose where a link leads: neither this user nor who has the directory, which all may write to.
/// Linux has the same rule (`fs.protected_symlinks`), but not everywhere, and macOS has none.
fn is_planted(of_link: u32, directory: &fs::Metadata, own: u32) -> bool {
    directory.mode() & WRITABLE_BY_ALL != 0 && of_link != own && of_link != directory.uid()
}

const WRITABLE_BY_ALL: u32 = 0o002;

/// Sends what is logged from here on to the file, or to stderr. Once a process.
pub(super) fn start(level: LogLevel, file: Option<File>) {
    start_at(
        level,
        file.map_or(Sink::Stderr, |file| Sink::File(Arc::new(file))),
    );
}

/// Sends it to stderr, where whoever typed what is wrong looks, and to the file of `-log-file`, if that is
/// another and can be opened.
pub(super) fn start_for_both(level: LogLevel, path: Option<&Path>) {
    let path = path.filter(|path| own_stream(path).is_none());
    let file = path.and_then(|path| open(path).ok());
    start_at(
        level,
        file.map_or(Sink::Stderr, |file| Sink::Both(Arc::new(file))),
    );
}

fn start_at(level: LogLevel, sink: Sink) {
    // One that is set already (by a test) stays.
    let _ = tracing_subscriber::fmt()
        .event_format(Lines)
        .with_writer(sink)
        // What the SSH library says, a guest can make it say; and what others say of the wire is for them who build it.
        .with_env_filter({
            let (level, most) = (filter(level), filter(level).min(Level::WARN));
            format!("{level},russh=off,h2={most},hyper={most},tonic={most},tower={most}")
        })
        .try_init();
}

/// How much the dataplane says at this level, as `RUST_LOG` has it.
pub(super) fn directive(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Panic | LogLevel::Fatal | LogLevel::Error => "error",
        LogLevel::Warning => "warn",
        // What it tells of each guest is told here already.
        LogLevel::Info => "warn",
        // What is said of the wire is for them who build it.
        LogLevel::Debug => "debug,h2=warn,hyper=warn,tonic=warn,tower=warn",
        LogLevel::Trace => "trace,h2=warn,hyper=warn,tonic=warn,tower=warn",
    }
}

/// Says again what the dataplane said in a line of its own log.
pub(super) fn relay(line: &str) {
    let (mut level, text) = relayed(line);
    if text.starts_with(NO_SESSION) && !LOSS.is_news(Instant::now()) {
        level = Level::DEBUG;
    }
    match level {
        Level::ERROR => tracing::error!("{text}"),
        Level::WARN => tracing::warn!("{text}"),
        Level::INFO => tracing::info!("{text}"),
        Level::DEBUG => tracing::debug!("{text}"),
        Level::TRACE => tracing::trace!("{text}"),
    }
}

/// How the dataplane says that its controlplane is lost.
const NO_SESSION: &str = "vnet_dataplane::session: no session";

/// That the controlplane is lost is found by the dataplane and by this process, each with reasons that
/// change; it is told once.
static LOSS: Seldom = Seldom::new(SAME_LOSS);
/// How long a loss is the same one. The dataplane dials again every five seconds at least.
const SAME_LOSS: Duration = Duration::from_secs(10);

/// Tells that there is no controlplane, unless that was told just now.
pub(super) fn lost_controlplane(why: &str) {
    let is_news = LOSS.is_news(Instant::now());
    let text = "no controlplane, so nothing new is let out; trying again";
    if is_news {
        tracing::warn!("{text} ({})", safe(why));
    } else {
        tracing::debug!("{text} ({})", safe(why));
    }
}

/// The level and the rest of a line as `tracing_subscriber` writes it (`TIME LEVEL module: text`); any other,
/// as of a panic, is an error.
fn relayed(line: &str) -> (Level, &str) {
    let mut words = line.splitn(2, char::is_whitespace);
    let (time, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let is_time = time.ends_with('Z') && time.contains('T');
    let rest = rest.trim_start();
    let level = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]
        .into_iter()
        .find(|level| rest.starts_with(level));
    match level {
        Some(level) if is_time => {
            let text = rest[level.len()..].trim_start();
            (level.parse().unwrap_or(Level::INFO), text)
        }
        _ => (Level::ERROR, line),
    }
}

fn filter(level: LogLevel) -> Level {
    match level {
        LogLevel::Panic | LogLevel::Fatal | LogLevel::Error => Level::ERROR,
        LogLevel::Warning => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    }
}

/// Where lines go.
#[derive(Clone)]
enum Sink {
    Stderr,
    File(Arc<File>),
    Both(Arc<File>),
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What cannot be written is lost. A complaint of that would be an `eprintln!`, which panics then.
        let _ = match self {
            Self::Stderr => io::stderr().write_all(bytes),
            Self::File(file) => (&**file).write_all(bytes),
            Self::Both(file) => {
                let _ = io::stderr().write_all(bytes);
                (&**file).write_all(bytes)
            }
        };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Sink {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// The form of a line.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        writeln!(
            writer,
            "{}",
            line(SystemTime::now(), word(event.metadata()), &fields)
        )
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field, format!("{value:?}"));
    }
}

impl Fields {
    fn take(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else {
            self.others.push((field.name(), value));
        }
    }
}

fn word(metadata: &tracing::Metadata<'_>) -> &'static str {
    match *metadata.level() {
        Level::ERROR if metadata.target() == FATAL => "fatal",
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn line(now: SystemTime, level: &str, fields: &Fields) -> String {
    let time = humantime::format_rfc3339_seconds(now);
    let mut line = format!("time=\"{time}\" level={level} msg={}", quoted(&fields.message));
    for (name, value) in &fields.others {
        let _ = write!(line, " {name}={}", quoted(value));
    }
    line
}

/// The value as the peer's logger has it: bare where it is one word of plain characters, else as a Go string.
fn quoted(value: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !value.is_empty() && value.chars().all(is_plain) {
        return value.to_owned();
    }
    let mut text = String::with_capacity(value.len() + 2);
    text.push('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c => text.push_str(&safe(c.encode_utf8(&mut [0; 4]))),
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn lines_have_the_peers_form() {
        let fields = Fields {
            message: "waiting for clients...".to_owned(),
            others: vec![("vm", "web".to_owned()), ("why", "a \"b\"\n\u{1b}[2J".to_owned())],
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);

        assert_eq!(
            line(now, "info", &fields),
            "time=\"2023-11-14T22:13:20Z\" level=info msg=\"waiting for clients...\" vm=web why=\"a \\\"b\\\"\\n\\u{1b}[2J\""
        );
    }

    #[test]
    fn the_dataplanes_lines_keep_their_level_and_what_has_none_is_an_error() {
        for (said, level, text) in [
            (
                "2026-07-21T10:00:00.000001Z  WARN vnet_dataplane::link: too many guests limit=256",
                Level::WARN,
                "vnet_dataplane::link: too many guests limit=256",
            ),
            ("2026-07-21T10:00:00.000001Z DEBUG x: y", Level::DEBUG, "x: y"),
            (
                "thread 'guest' panicked at dataplane/src/driver.rs:1:1:",
                Level::ERROR,
                "thread 'guest' panicked at dataplane/src/driver.rs:1:1:",
            ),
            ("", Level::ERROR, ""),
        ] {
            assert_eq!(relayed(said), (level, text));
        }
    }

    #[test]
    fn a_loss_that_the_dataplane_finds_is_known_by_its_words() {
        let said =
            "2026-07-21T10:00:00.000001Z  WARN vnet_dataplane::session: no session; nothing new is let out";
        assert!(relayed(said).1.starts_with(NO_SESSION));
    }

    #[test]
    fn nothing_is_told_of_the_wire_at_any_level() {
        for level in [LogLevel::Debug, LogLevel::Trace] {
            for of_the_wire in ["h2", "hyper", "tonic", "tower"] {
                let says = directive(level)
                    .split(',')
                    .find_map(|part| part.strip_prefix(of_the_wire));
                assert_eq!(says, Some("=warn"), "{of_the_wire} at {level}");
            }
        }
    }

    #[test]
    fn a_log_file_is_emptied_and_what_is_no_file_is_left_alone() {
        let path = std::env::temp_dir().join(format!("vnetctl-gvlog-{}", std::process::id()));
        std::fs::write(&path, "old").unwrap();

        let file = open(&path).unwrap();
        (&file).write_all(b"new\n").unwrap();

        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new\n");
        std::fs::remove_file(&path).unwrap();
        open(Path::new("/dev/null")).unwrap();
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_refused_and_one_that_is_read_is_written_to() {
        use std::io::Read as _;

        let path = std::env::temp_dir().join(format!("vnetctl-gvlog-fifo-{}", std::process::id()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = open(&path).unwrap_err().to_string();
        assert!(refused.starts_with("it is a pipe that nobody reads"), "{refused}");
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&path)
            .unwrap();
        let file = open(&path).unwrap();
        (&file).write_all(b"line\n").unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "line\n");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_link_in_a_directory_of_everybodys_is_followed_if_it_is_ones_own_and_not_if_it_is_anothers() {
        use std::os::unix::fs::{PermissionsExt as _, lchown, symlink};

        let directory = std::env::temp_dir().join(format!("vnetctl-gvlog-link-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let (link, target) = (directory.join("link"), directory.join("target"));
        symlink(&target, &link).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o1777)).unwrap();
        let own = geteuid().as_raw();

        // Also where nothing is there yet.
        for _ in 0..2 {
            (&open(&link).unwrap()).write_all(b"new\n").unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "new\n");
        }
        // Not /dev/stderr, which may be the file that these tests are told of in.
        let to_device = directory.join("device");
        symlink("/dev/null", &to_device).unwrap();
        open(&to_device).unwrap();
        let of_all = fs::metadata(&directory).unwrap();
        assert!(!is_planted(own, &of_all, own));
        assert!(!is_planted(own, &of_all, own + 2), "of who has the directory");
        assert!(is_planted(own + 1, &of_all, own));
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(!is_planted(own + 1, &fs::metadata(&directory).unwrap(), own));

        // Only root can give a link away.
        if own == 0 {
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o1777)).unwrap();
            lchown(&link, Some(1), None).unwrap();
            assert_eq!(open(&link).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(fs::read_to_string(&target).unwrap(), "new\n");
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
