//! What variables and the file say, which of them wins, and what is wrong with either.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::gvproxy::config::{Endpoint, Host};
use crate::gvproxy::flags::Flags;
use crate::gvproxy::yaml::FileConfig;

fn parse(text: &str) -> Result<Own, String> {
    Own::parse("f.yaml", text, None, "vm")
        .map_err(|findings| findings.iter().map(|f| format!("{f}\n")).collect::<String>())
}

fn variables(pairs: &[(&'static str, &str)]) -> impl Fn(&str) -> Option<OsString> {
    let map: HashMap<&'static str, OsString> = pairs.iter().map(|(k, v)| (*k, OsString::from(*v))).collect();
    move |name| map.get(name).cloned()
}

#[test]
fn every_key_is_read_and_a_vms_own_wins() {
    let text = "\
vm: web
mode: observe
network-policy: /etc/p.yaml
guest-api: on
guest-api-token-file: /etc/token
server: unix:///run/c.sock
labels: {team: a, tier: x}
vms:
  web: {mode: ask, labels: {team: b}, guest-api: false}
  other: {mode: block, network-policy: /etc/o.yaml}
";

    let own = parse(text).unwrap();

    assert_eq!(own.vm.unwrap().value, "web");
    assert_eq!(own.mode.unwrap().value, Mode::Ask);
    assert_eq!(own.network_policy.unwrap().value, Path::new("/etc/p.yaml"));
    assert!(!own.guest_api.unwrap().value);
    assert_eq!(own.guest_api_token_file.unwrap().value, Path::new("/etc/token"));
    assert_eq!(own.server.unwrap().value, Server::Unix("/run/c.sock".into()));
    let labels: Vec<(&str, &str)> = own.labels.iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(labels, [("team", "b"), ("tier", "x")]);
    assert_eq!(parse("").unwrap(), Own::default());
}

#[test]
fn a_vms_section_is_found_by_the_name_that_its_socket_gives() {
    let text = "vms: {podman-machine-default: {mode: ask}}\n";
    let own = Own::parse("f.yaml", text, None, "podman-machine-default").unwrap();
    assert_eq!(own.mode.unwrap().value, Mode::Ask);
    let named = Own::parse("f.yaml", text, Some("other"), "podman-machine-default").unwrap();
    assert_eq!(named, Own::default());
}

#[test]
fn what_is_wrong_is_told_with_its_place_all_at_once() {
    let told = parse("mod: ask\nmode: loud\nvm: a b\nnetwork-policy: p.yaml\nvms: {x: {mode: 1, vm: y}, x: {}}\nlabels: {a: \"b c\"}\n")
        .unwrap_err();
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(
        lines,
        [
            "f.yaml:1:1: key \"mod\" is not known in the file (did you mean mode?)",
            "f.yaml:2:7: \"loud\" is not a mode (expected enforce, ask, observe, block or quarantine)",
            "f.yaml:3:5: \"a b\" is no VM's name (expected up to 63 letters, digits, dots, dashes and underscores)",
            "f.yaml:4:17: network-policy is \"p.yaml\" (expected an absolute path)",
            "f.yaml:5:17: \"1\" is not a mode (expected enforce, ask, observe, block or quarantine)",
            "f.yaml:5:20: key \"vm\" is not known in vms[\"x\"] (expected labels, mode, network-policy, guest-api or guest-api-token-file)",
            "f.yaml:5:28: vms[\"x\"] is given twice",
            "f.yaml:6:9: label \"a\" has a value that is not 1 to 63 of letters, digits, '.', '_' and '-'",
        ]
    );
}

#[test]
fn a_variable_wins_over_the_file_and_a_wrong_one_is_named() {
    let directory = std::env::temp_dir().join(format!("vnetctl-own-{}", std::process::id()));
    std::fs::create_dir_all(directory.join("vnet")).unwrap();
    let file = directory.join("vnet/gvproxy.yaml");
    std::fs::write(&file, "mode: ask\nlabels: {a: b}\nvms: {db: {guest-api: true}}\n").unwrap();
    let place = directory.display().to_string();

    let own = Own::load(
        variables(&[
            ("XDG_CONFIG_HOME", &place),
            ("VNET_MODE", "block"),
            ("VNET_VM", "db"),
            ("VNET_LABELS", "a=c,d=e"),
            ("VNET_NETWORK_POLICY", "p.yaml"),
            ("VNET_SERVER", ""),
        ]),
        "vm",
    )
    .unwrap();
    let wrong = Own::load(
        variables(&[
            ("VNET_MODE", "x"),
            ("VNET_LABELS", "a"),
            ("VNET_GUEST_API", "maybe"),
            ("VNET_SERVER", "x"),
        ]),
        "vm",
    )
    .unwrap_err();
    let empty = Own::load(
        variables(&[
            ("VNET_MODE", ""),
            ("VNET_NETWORK_POLICY", ""),
            ("VNET_GUEST_API", ""),
            ("VNET_GUEST_API_TOKEN_FILE", ""),
            ("VNET_SERVER", ""),
        ]),
        "vm",
    )
    .unwrap_err();
    assert_eq!(
        empty,
        [
            "VNET_MODE",
            "VNET_NETWORK_POLICY",
            "VNET_GUEST_API",
            "VNET_GUEST_API_TOKEN_FILE"
        ]
        .map(|name| format!("{name} is empty (give it a value, or unset it)"))
    );
    let none = "leave it out for none";
    for (text, place, remedy) in [
        ("mode:\n", "1:5: mode", none),
        ("network-policy: \"\"\n", "1:17: network-policy", none),
        (
            "guest-api:\n",
            "1:10: guest-api",
            "say on or off, or leave it out",
        ),
        ("guest-api-token-file:\n", "1:21: guest-api-token-file", none),
        ("guest-api-token-file: \"\"\n", "1:23: guest-api-token-file", none),
        (
            "vms: {vm: {guest-api-token-file: \"\"}}\n",
            "1:34: vms[\"vm\"].guest-api-token-file",
            none,
        ),
    ] {
        let found = Own::parse("gvproxy.yaml", text, None, "vm").unwrap_err();
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, [format!("gvproxy.yaml:{place} is empty ({remedy})")]);
    }
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    let open = Own::load(variables(&[("XDG_CONFIG_HOME", &place)]), "vm").unwrap_err();
    std::fs::remove_file(&file).unwrap();
    // One that was to be there, and what nobody would ever end.
    let refused = || Own::load(variables(&[("XDG_CONFIG_HOME", &place)]), "vm").unwrap_err();
    std::os::unix::fs::symlink("/nowhere/gvproxy.yaml", &file).unwrap();
    let dangling = refused();
    std::fs::remove_file(&file).unwrap();
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let pipe = refused();
    std::fs::remove_dir_all(&directory).unwrap();
    let absent = Own::load(variables(&[("XDG_CONFIG_HOME", &place)]), "vm").unwrap();

    assert_eq!(own.mode.as_ref().unwrap().value, Mode::Block);
    assert_eq!(own.mode.unwrap().from.to_string(), "VNET_MODE");
    assert!(
        own.guest_api.unwrap().value,
        "the file's section of the VM that the variable names"
    );
    assert_eq!(own.network_policy.unwrap().value, Path::new("p.yaml"));
    assert_eq!(own.guest_api_token_file, None, "an empty variable says nothing");
    let labels: Vec<(&str, &str)> = own.labels.iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(labels, [("a", "c"), ("d", "e")]);
    assert_eq!(
        wrong,
        [
            "VNET_MODE: \"x\" is not a mode (expected enforce, ask, observe, block or quarantine)",
            "VNET_GUEST_API: \"maybe\" is no switch (expected on or off)",
            "VNET_SERVER: \"x\" is not a controlplane's address (expected unix:///PATH)",
            "VNET_LABELS: label \"a\" has no value (expected KEY=VALUE)",
        ]
    );
    assert_eq!(own.unheard.len(), 1);
    assert!(
        own.unheard[0].ends_with("gvproxy.yaml:1:7: mode: mode ask is not used, as VNET_MODE says block"),
        "{:?}",
        own.unheard
    );
    assert!(
        dangling[0].ends_with("gvproxy.yaml: it is a link to /nowhere/gvproxy.yaml, which is not there; make that, or remove the link"),
        "{dangling:?}"
    );
    assert!(
        pipe[0]
            .ends_with("gvproxy.yaml: it is no file; remove it, or set XDG_CONFIG_HOME to another directory"),
        "{pipe:?}"
    );
    assert_eq!(open.len(), 1);
    assert!(
        open[0].ends_with("gvproxy.yaml: others may write it; run: chmod go-w on it"),
        "{open:?}"
    );
    assert_eq!(absent, Own::default());
}

#[test]
fn the_file_is_where_the_users_configuration_is() {
    let at = |pairs: &[(&'static str, &str)]| path(variables(pairs)).map(|path| path.display().to_string());
    assert_eq!(
        at(&[("XDG_CONFIG_HOME", "/c"), ("HOME", "/h")]).as_deref(),
        Some("/c/vnet/gvproxy.yaml")
    );
    assert_eq!(
        at(&[("XDG_CONFIG_HOME", "c"), ("HOME", "/h")]).as_deref(),
        Some("/h/.config/vnet/gvproxy.yaml")
    );
    // As a service of the system's has it: no variable, but an account.
    let account = home_dir(nix::unistd::geteuid().as_raw(), |_| None);
    let its_own = account.map(|home| home.join(".config/vnet/gvproxy.yaml").display().to_string());
    assert_eq!(at(&[]), its_own);
}

#[test]
fn a_vm_is_named_after_its_socket_or_pid_file() {
    let named = |qemu: Option<&str>, pid: Option<&str>| {
        let host = Host {
            search_domains: &[],
            exists: &|_| Ok(false),
            is_no_directory: &|_| false,
        };
        let (mut config, _) = Config::resolve(&Flags::default(), FileConfig::default(), &host).unwrap();
        config.interfaces.qemu = qemu.map(|path| Endpoint::Unix(path.into()));
        config.pid_file = pid.map(|path| Given::flag("pid-file", PathBuf::from(path)));
        vm_name(&config)
    };
    for (socket, pid, name) in [
        (
            Some("/run/podman/podman-machine-default-gvproxy.sock"),
            None,
            "podman-machine-default",
        ),
        (Some("/tmp/qmp_dev.sock"), None, "dev"),
        (Some("/tmp/gvproxy.sock"), Some("/run/web.pid"), "web"),
        (Some("/tmp/qemu-net.sock"), Some("/run/gvproxy.pid"), "vm"),
        (Some("/tmp/a b.sock"), None, "vm"),
        (Some("/tmp/lima-0.sock"), None, "lima-0"),
        (None, None, "vm"),
    ] {
        assert_eq!(named(socket, pid), name, "{socket:?} {pid:?}");
    }
}

#[test]
fn a_variable_that_is_nearly_one_of_ours_is_told_of() {
    let told = |names: &[&str]| misspelt(names.iter().map(OsString::from));
    assert_eq!(
        told(&[
            "VNET_MDOE",
            "VNET_MODE",
            "VNET_NETWORK_POLCY",
            "HOME",
            "VNET_TEST_BINARIES",
            "NET_MODE"
        ]),
        [
            "VNET_MDOE: nothing reads this variable (did you mean VNET_MODE?)",
            "VNET_NETWORK_POLCY: nothing reads this variable (did you mean VNET_NETWORK_POLICY?)",
        ]
    );
    assert_eq!(told(&VARIABLES), [""; 0]);
}

#[test]
fn a_file_that_may_not_be_read_is_not_passed_over_and_what_helps_is_told() {
    let path = Path::new("/home/a/.config/vnet/gvproxy.yaml");
    let told = unreadable(path, &io::Error::from_raw_os_error(libc::EACCES));
    let uid = nix::unistd::geteuid();
    assert_eq!(
        told,
        format!(
            "cannot read /home/a/.config/vnet/gvproxy.yaml: Permission denied (os error 13) (it may hold a policy, and is \
             not passed over: let uid {uid} read it, or set XDG_CONFIG_HOME to another directory)"
        )
    );
}
