//! Options that several commands share: which VMs, for how long, and how much.

use std::time::Duration;

use clap::Args;
use vnet_proto::model::{LIFETIME_MAX, LIFETIME_MIN, VmSelector, label_problem};
use vnet_proto::v1;

use crate::failure::Failure;

/// Which VMs a command is about.
#[derive(Debug, Clone, Default, Args)]
pub struct VmArgs {
    /// The VM's name; `*` stands for any run of characters
    #[arg(long, value_name = "NAME", value_parser = vm_name, conflicts_with_all = ["selector", "all_vms"])]
    pub vm: Option<String>,
    /// The VMs that carry all of these labels
    #[arg(short = 'l', long, value_name = "K=V[,K=V...]", conflicts_with = "all_vms")]
    pub selector: Option<VmSelector>,
    /// Every VM, those to come included
    #[arg(long)]
    pub all_vms: bool,
}

impl VmArgs {
    /// The selector, or nothing if none was given.
    pub fn message(&self) -> Option<v1::VmSelector> {
        let selector = match (&self.vm, &self.selector, self.all_vms) {
            (Some(name), _, _) => VmSelector::named(name),
            (None, Some(selector), _) => selector.clone(),
            (None, None, true) => VmSelector::all(),
            (None, None, false) => return None,
        };
        Some((&selector).into())
    }
}

/// Which VMs a list shows.
#[derive(Debug, Clone, Default, Args)]
pub struct ListVmArgs {
    /// Only this VM; `*` stands for any run of characters
    #[arg(long, value_name = "NAME", value_parser = vm_name, conflicts_with = "selector")]
    pub vm: Option<String>,
    /// Only VMs that carry all of these labels
    #[arg(short = 'l', long, value_name = "K=V[,K=V...]")]
    pub selector: Option<VmSelector>,
}

impl ListVmArgs {
    /// The selector, or nothing for every VM.
    pub fn message(&self) -> Option<v1::VmSelector> {
        VmArgs {
            vm: self.vm.clone(),
            selector: self.selector.clone(),
            all_vms: false,
        }
        .message()
    }
}

/// How long an answer holds.
#[derive(Debug, Clone, Default, Args)]
pub struct LifetimeArgs {
    /// For this long, as `10m`, `1h` or `2days`
    #[arg(long = "for", value_name = "TIME", value_parser = duration, conflicts_with_all = ["once", "forever"])]
    pub duration: Option<Duration>,
    /// For one connection or lookup
    #[arg(long, conflicts_with = "forever")]
    pub once: bool,
    /// Until it is revoked
    #[arg(long)]
    pub forever: bool,
}

impl LifetimeArgs {
    /// The lifetime, or nothing if none was given.
    ///
    /// # Errors
    /// A time under the contract's least, or over its most.
    pub fn message(&self) -> Result<Option<v1::Lifetime>, Failure> {
        let kind = match (self.duration, self.once, self.forever) {
            (Some(duration), _, _) if duration < LIFETIME_MIN => {
                return Err(Failure::Usage(
                    "--for is under one second (expected at least 1s)".to_owned(),
                ));
            }
            (Some(duration), _, _) if duration > LIFETIME_MAX => {
                return Err(Failure::Usage(
                    "--for is over 36525 days (expected at most 36525days; for an answer without an end: --forever)"
                        .to_owned(),
                ));
            }
            (Some(duration), _, _) => v1::lifetime::Kind::Duration(
                prost_types::Duration::try_from(duration)
                    .map_err(|e| Failure::Usage(format!("--for is out of range: {e}")))?,
            ),
            (None, true, _) => v1::lifetime::Kind::Once(true),
            (None, _, true) => v1::lifetime::Kind::Forever(true),
            _ => return Ok(None),
        };
        Ok(Some(v1::Lifetime { kind: Some(kind) }))
    }
}

/// Parses a VM's name, or a pattern of names. Nothing is not every VM, nor the only one there is.
///
/// # Errors
/// If it is empty.
pub fn vm_name(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("it is empty (expected a VM's name; list them with: vnetctl vm list)".to_owned());
    }
    Ok(text.to_owned())
}

/// How much may be done under a yes; all VMs that it is for share it.
#[derive(Debug, Clone, Default, Args)]
pub struct BudgetArgs {
    /// At most so many connections
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "once")]
    pub connections: Option<u64>,
    /// At most so much from the guest, as `500kB` or `5MiB`
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "once")]
    pub bytes_up: Option<u64>,
    /// At most so much to the guest, as `50MB` or `1GiB`
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "once")]
    pub bytes_down: Option<u64>,
}

impl BudgetArgs {
    /// The budget, or nothing if none was given.
    pub fn message(&self) -> Option<v1::Budget> {
        let budget = v1::Budget {
            connections: self.connections.unwrap_or_default(),
            bytes_up: self.bytes_up.unwrap_or_default(),
            bytes_down: self.bytes_down.unwrap_or_default(),
        };
        (budget != v1::Budget::default()).then_some(budget)
    }
}

/// Parses a size in bytes: a whole number, alone or with a unit of thousands (`kB`, `MB`, `GB`, `TB`) or of
/// 1024s (`KiB`, `MiB`, `GiB`, `TiB`), whatever its case.
///
/// # Errors
/// One sentence that says what was expected.
pub fn size(text: &str) -> Result<u64, String> {
    let expected = || format!("{text:?} is not a size (expected one as 4096, 500kB or 5MiB, above zero)");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(expected()),
    };
    let number: u64 = number.parse().map_err(|_| expected())?;
    number
        .checked_mul(unit)
        .filter(|bytes| *bytes != 0)
        .ok_or_else(expected)
}

/// Parses `K=V`.
///
/// # Errors
/// One sentence that says what was expected.
pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => (key, value),
        _ => return Err(format!("{text:?} is not a label (expected KEY=VALUE)")),
    };
    match label_problem(key, value) {
        Some(why) => Err(format!("{text:?} {why}")),
        None => Ok((key.to_owned(), value.to_owned())),
    }
}

/// Parses a span of time, as `90s`, `10m`, `1h 30m`, `2days`.
///
/// # Errors
/// What is wrong with it.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{e} (expected a time as 90s, 10m or 1h)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_option_is_no_selector() {
        assert_eq!(VmArgs::default().message(), None);
        let all = VmArgs {
            all_vms: true,
            ..Default::default()
        };
        assert_eq!(
            all.message(),
            Some(v1::VmSelector {
                all: true,
                ..Default::default()
            })
        );
    }

    #[test]
    fn lifetimes_under_a_second_are_refused() {
        let short = LifetimeArgs {
            duration: Some(Duration::from_millis(10)),
            ..Default::default()
        };
        assert!(short.message().unwrap_err().to_string().contains("at least 1s"));
        let hour = LifetimeArgs {
            duration: Some(Duration::from_secs(3600)),
            ..Default::default()
        };
        let kind = hour.message().unwrap().unwrap().kind;
        assert_eq!(
            kind,
            Some(v1::lifetime::Kind::Duration(prost_types::Duration {
                seconds: 3600,
                nanos: 0
            }))
        );
    }

    #[test]
    fn lifetimes_over_a_hundred_years_are_refused_with_the_remedy() {
        let lasting = |duration| LifetimeArgs {
            duration: Some(duration),
            ..Default::default()
        };
        assert!(lasting(LIFETIME_MAX).message().is_ok());
        for long in [
            LIFETIME_MAX + Duration::from_nanos(1),
            duration("99999999999h").unwrap(),
            Duration::MAX,
        ] {
            let refused = lasting(long).message().unwrap_err();
            assert_eq!(refused.exit_code(), 2);
            assert!(refused.to_string().contains("--forever"), "{refused}");
        }
    }

    #[test]
    fn sizes_have_units_of_thousands_and_of_1024s() {
        let cases = [
            ("4096", 4096),
            ("1b", 1),
            ("500kB", 500_000),
            ("5MiB", 5 << 20),
            ("5 mib", 5 << 20),
            ("2G", 2_000_000_000),
        ];
        for (text, bytes) in cases {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "0",
            "MiB",
            "-1",
            "1.5MB",
            "5 miles",
            "99999999999TB",
            "\u{666}",
        ] {
            assert!(size(bad).unwrap_err().contains("expected one as"), "{bad}");
        }
    }

    #[test]
    fn labels_have_a_key_and_a_value() {
        assert_eq!(label("env=prod"), Ok(("env".to_owned(), "prod".to_owned())));
        for bad in ["env", "=prod", "env="] {
            assert!(label(bad).unwrap_err().contains("KEY=VALUE"), "{bad}");
        }
    }

    #[test]
    fn labels_that_a_run_could_not_have_are_refused_here_too() {
        for bad in ["a b=c", ".x=1", "x=a b", "x=\u{202e}"] {
            assert!(label(bad).unwrap_err().contains("letters, digits"), "{bad}");
        }
        assert!(label("team.example/role=a_b-1").is_ok());
    }

    #[test]
    fn an_empty_name_is_no_vms() {
        assert!(vm_name("").unwrap_err().contains("a VM's name"));
        assert_eq!(vm_name("web-*"), Ok("web-*".to_owned()));
    }
}
