//! What a fixed command line cannot say: podman machine and Lima type gvproxy's flags themselves, so mode, policy and
//! the VM's name come from `$XDG_CONFIG_HOME/vnet/gvproxy.yaml` or from variables.
//!
//! The command line, and the file that it names by `-config`, win over a variable, and a variable over this file; in
//! it, what stands under the VM's own name wins over what stands at the top.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use vnet_proto::model::{Mode, label_problem};

use super::config::Config;
use super::origin::{Finding, Given, Origin};
use super::yaml::{Fields, Node, Reader, Value, load_tree};
use crate::client::Server;
use crate::launch::{absolute, home_dir, is_name, nearest};

/// Bytes that the file may have.
const FILE_BYTES_MAX: usize = 1 << 20;
/// VMs that it may name.
const VMS_MAX: usize = 1024;

const KEYS: [&str; 8] = [
    "vm",
    "labels",
    "mode",
    "network-policy",
    "guest-api",
    "guest-api-token-file",
    "server",
    "vms",
];
/// The keys that a VM may have of its own.
const VM_KEYS: [&str; 5] = [
    "labels",
    "mode",
    "network-policy",
    "guest-api",
    "guest-api-token-file",
];

/// The variables.
pub const VARIABLES: [&str; 7] = [
    "VNET_VM",
    "VNET_LABELS",
    "VNET_MODE",
    "VNET_NETWORK_POLICY",
    "VNET_GUEST_API",
    "VNET_GUEST_API_TOKEN_FILE",
    "VNET_SERVER",
];

/// Those that restrict guests: nothing in the place of one must not be taken for none.
const RESTRICTING: [&str; 4] = [
    "VNET_MODE",
    "VNET_NETWORK_POLICY",
    "VNET_GUEST_API",
    "VNET_GUEST_API_TOKEN_FILE",
];

/// What was said there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// The VM's name.
    pub vm: Option<Given<String>>,
    /// The VM's labels.
    pub labels: BTreeMap<String, String>,
    /// Its mode.
    pub mode: Option<Given<Mode>>,
    /// A file with its policy.
    pub network_policy: Option<Given<PathBuf>>,
    /// Whether guests may ask the gateway for forwards (port 80). `None`: where no policy and no mode is given.
    pub guest_api: Option<Given<bool>>,
    /// A file with the token that guests must show for it.
    pub guest_api_token_file: Option<Given<PathBuf>>,
    /// The controlplane.
    pub server: Option<Given<Server>>,
    /// What the file says and a variable overrules: a line each, for its writer.
    pub unheard: Vec<String>,
}

/// What is said of variables that nothing reads and that look like one of [`VARIABLES`], a line each.
pub fn misspelt(set: impl Iterator<Item = OsString>) -> Vec<String> {
    let ours = set.filter_map(|name| name.into_string().ok());
    let mut lines: Vec<String> = ours
        .filter(|name| name.starts_with("VNET_") && !VARIABLES.contains(&&**name))
        .filter_map(|name| {
            let meant = nearest(&name, &VARIABLES)?;
            Some(format!(
                "{name}: nothing reads this variable (did you mean {meant}?)"
            ))
        })
        .collect();
    lines.sort();
    lines
}

/// Where the file is, if this user has a place for it.
pub fn path(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // XDG Base Directory Specification.
    let directory = absolute(&variable, "XDG_CONFIG_HOME").or_else(|| {
        let home = home_dir(nix::unistd::geteuid().as_raw(), &variable)?;
        Some(home.join(".config"))
    })?;
    Some(directory.join("vnet/gvproxy.yaml"))
}

/// The VM's name where nobody gives one: that of its hypervisor's socket, else of the pid file, without what is
/// gvproxy's in it; `vm` where nothing is left.
pub fn vm_name(config: &Config) -> String {
    let interfaces = &config.interfaces;
    let sockets = [
        &interfaces.qemu,
        &interfaces.vfkit,
        &interfaces.bess,
        &interfaces.vpnkit,
    ];
    let sockets = sockets
        .into_iter()
        .flatten()
        .chain(&config.listen)
        .filter_map(|at| at.path());
    sockets
        .chain(config.pid_file.as_ref().map(|given| given.value.as_path()))
        .find_map(name_of)
        .unwrap_or_else(|| "vm".to_owned())
}

fn name_of(path: &Path) -> Option<String> {
    const MEANINGLESS: [&str; 14] = [
        "gvproxy", "proxy", "qemu", "qmp", "vfkit", "krunkit", "bess", "vpnkit", "network", "net", "vm",
        "socket", "api", "gv",
    ];
    let stem = path.file_stem()?.to_string_lossy();
    let words: Vec<&str> = stem.split(['-', '_', '.']).collect();
    let meaning =
        |word: &&str| !word.is_empty() && !MEANINGLESS.contains(&word.to_ascii_lowercase().as_str());
    let first = words.iter().position(meaning)?;
    let last = words.iter().rposition(meaning)?;
    // Bytes of words are those of the stem: separators are one byte each.
    let start: usize = words[..first].iter().map(|word| word.len() + 1).sum();
    let length: usize = words[first..=last]
        .iter()
        .map(|word| word.len() + 1)
        .sum::<usize>()
        - 1;
    let name = &stem[start..start + length];
    is_name(name).then(|| name.to_owned())
}

impl Own {
    /// Reads the variables and the file. `vm` is the name that the VM has where neither gives one.
    ///
    /// # Errors
    /// Everything that is wrong, a line each.
    pub fn load(variable: impl Fn(&str) -> Option<OsString>, vm: &str) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let said = Self::from_variables(&variable, &mut problems);
        let name = said.vm.as_ref().map(|given| given.value.clone());
        let file = match path(&variable) {
            Some(path) => match read(&path) {
                Ok(Some(text)) => {
                    match Self::parse(&path.display().to_string(), &text, name.as_deref(), vm) {
                        Ok(own) => own,
                        Err(findings) => {
                            problems.extend(findings.iter().map(ToString::to_string));
                            Self::default()
                        }
                    }
                }
                Ok(None) => Self::default(),
                Err(error) => {
                    problems.push(unreadable(&path, &error));
                    Self::default()
                }
            },
            None => Self::default(),
        };
        if problems.is_empty() {
            Ok(said.over(file))
        } else {
            Err(problems)
        }
    }

    /// Each value of this, else of the other. What of the other is not heard is told: it may be the stricter word.
    fn over(self, other: Self) -> Self {
        let mut labels = other.labels;
        labels.extend(self.labels);
        let mut unheard = other.unheard;
        let told = &mut unheard;
        Self {
            vm: over(self.vm, other.vm, "the VM's name", String::clone, told),
            labels,
            mode: over(self.mode, other.mode, "mode", Mode::to_string, told),
            network_policy: over(
                self.network_policy,
                other.network_policy,
                "policy",
                |path| shown(path),
                told,
            ),
            guest_api: over(self.guest_api, other.guest_api, "guest-api", on_or_off, told),
            guest_api_token_file: over(
                self.guest_api_token_file,
                other.guest_api_token_file,
                "the file with guests' token",
                |path| shown(path),
                told,
            ),
            server: over(self.server, other.server, "server", Server::to_string, told),
            unheard,
        }
    }

    fn from_variables(variable: &impl Fn(&str) -> Option<OsString>, problems: &mut Vec<String>) -> Self {
        let mut text = |name: &'static str| {
            let value = variable(name)?;
            if value.is_empty() {
                if RESTRICTING.contains(&name) {
                    problems.push(format!("{name} is empty (give it a value, or unset it)"));
                }
                return None;
            }
            match value.into_string() {
                Ok(value) => Some(Given {
                    value,
                    from: Origin::Variable(name),
                }),
                Err(_) => {
                    problems.push(format!("{name} is no text (expected UTF-8)"));
                    None
                }
            }
        };
        let [vm, labels, mode, policy, guest_api, token, server] = VARIABLES.map(&mut text);
        let mut own = Self {
            network_policy: policy.map(|given| given.map(PathBuf::from)),
            guest_api_token_file: token.map(|given| given.map(PathBuf::from)),
            ..Self::default()
        };
        let mut told = |problem| problems.push(problem);
        own.vm = vm.and_then(|given| checked(given, named, &mut told));
        own.mode = mode.and_then(|given| checked(given, Mode::from_str, &mut told));
        own.guest_api = guest_api.and_then(|given| checked(given, switched, &mut told));
        own.server = server.and_then(|given| checked(given, Server::from_str, &mut told));
        if let Some(given) = labels {
            for label in given.value.split(',').filter(|label| !label.is_empty()) {
                let found = match label.split_once('=') {
                    Some((key, value)) => labelled(&mut own.labels, key, value),
                    None => Err("has no value (expected KEY=VALUE)"),
                };
                if let Err(why) = found {
                    told(format!("{}: label {label:?} {why}", given.from));
                }
            }
        }
        own
    }

    /// Reads the file's text. `named` is the VM's name if it was given elsewhere, `vm` what it is if nobody gives one.
    fn parse(file: &str, text: &str, named: Option<&str>, vm: &str) -> Result<Self, Vec<Finding>> {
        // A key that is not known might have been a policy.
        let mut reader = Reader::new(file, true);
        if text.len() > FILE_BYTES_MAX {
            let problem = format!("the file is longer than {FILE_BYTES_MAX} bytes");
            reader.problem_at(1, 1, problem);
            return reader.end(Self::default()).map(|(own, _)| own);
        }
        let own = match load_tree(text) {
            Ok(root) => read_file(&mut reader, &root, named, vm),
            Err(problem) => {
                reader.problem_at(problem.place.line, problem.place.column, problem.text);
                Self::default()
            }
        };
        reader.end(own).map(|(own, _)| own)
    }
}

fn read_file(reader: &mut Reader, root: &Node, named_elsewhere: Option<&str>, vm: &str) -> Own {
    let mut fields = reader.fields(root, "", &KEYS);
    let mut own = read_vm(reader, &mut fields, "");
    if let Some(node) = fields.take("vm")
        && let Some(given) = reader.text(node, "vm")
    {
        own.vm = check_at(reader, node, given, named);
    }
    if let Some(node) = fields.take("server")
        && let Some(given) = reader.text(node, "server")
    {
        own.server = check_at(reader, node, given, Server::from_str);
    }
    let name = named_elsewhere
        .or(own.vm.as_ref().map(|given| given.value.as_str()))
        .unwrap_or(vm)
        .to_owned();
    if let Some(node) = fields.take("vms") {
        let vms = reader.named_mappings(node, "vms");
        if vms.len() > VMS_MAX {
            let text = format!("vms has {} entries (at most {VMS_MAX})", vms.len());
            reader.problem(node, text);
            return own;
        }
        let mut of_this = None;
        for (key, value) in vms {
            let within = format!("vms[{key:?}].");
            let mut fields = reader.fields(value, &within, &VM_KEYS);
            // Every one of them is read, so that what is wrong is found before its VM starts.
            let read = read_vm(reader, &mut fields, &within);
            if key == name {
                of_this = Some(read);
            }
        }
        if let Some(of_this) = of_this {
            own = of_this.over(own);
        }
    }
    own
}

fn read_vm(reader: &mut Reader, fields: &mut Fields<'_>, within: &str) -> Own {
    let mut own = Own::default();
    // Nothing in the place of a restriction must not be taken for none.
    let is_nothing = |node: &Node| match &node.value {
        Value::Null => true,
        Value::Scalar(scalar) => scalar.text.is_empty(),
        _ => false,
    };
    if let Some(node) = fields.take("mode") {
        let path = format!("{within}mode");
        if is_nothing(node) {
            reader.problem(node, format!("{path} is empty (leave it out for none)"));
        }
        if let Some(given) = reader.text(node, &path) {
            own.mode = check_at(reader, node, given, Mode::from_str);
        }
    }
    if let Some(node) = fields.take("guest-api") {
        if matches!(node.value, Value::Null) {
            reader.problem(
                node,
                format!("{within}guest-api is empty (say on or off, or leave it out)"),
            );
        }
        own.guest_api = reader.boolean(node, &format!("{within}guest-api"));
    }
    let mut path = |key: &str| {
        let node = fields.take(key)?;
        if is_nothing(node) {
            reader.problem(node, format!("{within}{key} is empty (leave it out for none)"));
        }
        let given = reader.text(node, &format!("{within}{key}"))?;
        if Path::new(&given.value).is_absolute() {
            return Some(given.map(PathBuf::from));
        }
        let problem = format!("{within}{key} is {:?} (expected an absolute path)", given.value);
        reader.problem(node, problem);
        None
    };
    own.network_policy = path("network-policy");
    own.guest_api_token_file = path("guest-api-token-file");
    if let Some(node) = fields.take("labels") {
        for (key, given) in reader.text_map(node, &format!("{within}labels"), "team: web") {
            if let Err(why) = labelled(&mut own.labels, &key, &given.value) {
                reader.problem(node, format!("label {key:?} {why}"));
            }
        }
    }
    own
}

fn checked<T, E: std::fmt::Display>(
    given: Given<String>,
    read: impl Fn(&str) -> Result<T, E>,
    told: &mut impl FnMut(String),
) -> Option<Given<T>> {
    match read(&given.value) {
        Ok(value) => Some(given.map(|_| value)),
        Err(error) => {
            told(format!("{}: {error}", given.from));
            None
        }
    }
}

fn check_at<T, E: std::fmt::Display>(
    reader: &mut Reader,
    node: &Node,
    given: Given<String>,
    read: impl Fn(&str) -> Result<T, E>,
) -> Option<Given<T>> {
    match read(&given.value) {
        Ok(value) => Some(given.map(|_| value)),
        Err(error) => {
            reader.problem(node, error.to_string());
            None
        }
    }
}

/// The first of two, and a line about the second where it says something else.
fn over<T: PartialEq>(
    first: Option<Given<T>>,
    second: Option<Given<T>>,
    what: &str,
    show: impl Fn(&T) -> String,
    unheard: &mut Vec<String>,
) -> Option<Given<T>> {
    if let (Some(first), Some(second)) = (&first, &second)
        && first.value != second.value
    {
        let (value, says) = (show(&second.value), show(&first.value));
        unheard.push(format!(
            "{}: {what} {value} is not used, as {} says {says}",
            second.from, first.from
        ));
    }
    first.or(second)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn on_or_off(is_on: &bool) -> String {
    if *is_on { "on" } else { "off" }.to_owned()
}

fn named(text: &str) -> Result<String, String> {
    if is_name(text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{text:?} is no VM's name (expected up to 63 letters, digits, dots, dashes and underscores)"
    ))
}

fn switched(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(format!("{text:?} is no switch (expected on or off)")),
    }
}

fn labelled(labels: &mut BTreeMap<String, String>, key: &str, value: &str) -> Result<(), &'static str> {
    if let Some(why) = label_problem(key, value) {
        return Err(why);
    }
    labels.insert(key.to_owned(), value.to_owned());
    Ok(())
}

/// What is said where the file is there and cannot be read.
fn unreadable(path: &Path, error: &io::Error) -> String {
    let mut text = format!("cannot read {}: {error}", path.display());
    if error.raw_os_error().is_some() && error.kind() == io::ErrorKind::PermissionDenied {
        let uid = nix::unistd::geteuid();
        let _ = write!(
            text,
            " (it may hold a policy, and is not passed over: let uid {uid} read it, or set XDG_CONFIG_HOME to another \
             directory)"
        );
    }
    text
}

/// The file's text; `None` where there is no file. One that others may write says nothing on its owner's behalf; one that
/// is meant to be there and is not might have been a policy.
fn read(path: &Path) -> io::Result<Option<String>> {
    // Who opens a pipe would wait for its writer.
    let opened = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            let to = std::fs::read_link(path)?;
            return Err(io::Error::other(format!(
                "it is a link to {}, which is not there; make that, or remove the link",
                to.display()
            )));
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other(
            "it is no file; remove it, or set XDG_CONFIG_HOME to another directory",
        ));
    }
    let uid = nix::unistd::geteuid().as_raw();
    if found.uid() != uid && found.uid() != 0 {
        return Err(io::Error::other(format!(
            "it belongs to uid {}, not to uid {uid}; give it to that one (chown), or set XDG_CONFIG_HOME to another \
             directory",
            found.uid()
        )));
    }
    if found.mode() & 0o022 != 0 {
        return Err(io::Error::other("others may write it; run: chmod go-w on it"));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests;
