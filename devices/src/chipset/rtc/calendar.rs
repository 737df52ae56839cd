//! Dates and times of the proleptic Gregorian calendar, years 0 to 9999.

/// Nanoseconds in a second.
pub(super) const NANOSECONDS: i128 = 1_000_000_000;

const DAY_SECONDS: i128 = 86_400;
/// Days of 400 years.
const ERA_DAYS: i128 = 146_097;
/// 0000-01-01 00:00:00 and 9999-12-31 23:59:59 as seconds since 1970.
const FIRST_SECOND: i128 = -62_167_219_200;
const LAST_SECOND: i128 = 253_402_300_799;

/// A moment, to the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    /// 0 to 9999.
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 0 to 59.
    pub(super) minute: u8,
    /// 0 to 59.
    pub(super) second: u8,
}

impl DateTime {
    /// The moment `nanoseconds` after 1970-01-01 00:00, kept within the years 0 to 9999.
    pub(super) fn from_nanoseconds(nanoseconds: i128) -> Self {
        let seconds = nanoseconds.div_euclid(NANOSECONDS).clamp(FIRST_SECOND, LAST_SECOND);
        let (days, of_day) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
        // Years are counted from the 1st of March, so that the leap day is a year's last.
        let shifted = days + 719_468;
        let (era, of_era) = (shifted.div_euclid(ERA_DAYS), shifted.rem_euclid(ERA_DAYS));
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era * 400 + year_of_era + i128::from(month <= 2);
        let small = |value: i128| u8::try_from(value).unwrap_or(0);
        Self {
            year: u16::try_from(year).unwrap_or(0),
            month: small(month),
            day: small(day),
            hour: small(of_day / 3600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
        }
    }

    /// The nearest moment to what a guest wrote.
    pub(super) fn clamped(year: u16, month: u8, day: u8, hour: u8, minute: u8, second: u8) -> Self {
        let (year, month) = (year.min(9999), month.clamp(1, 12));
        Self {
            year,
            month,
            day: day.clamp(1, days_in_month(year, month)),
            hour: hour.min(23),
            minute: minute.min(59),
            second: second.min(59),
        }
    }

    /// Nanoseconds since 1970-01-01 00:00.
    pub(super) fn to_nanoseconds(self) -> i128 {
        let march_year = i128::from(self.year) - i128::from(self.month <= 2);
        let march_month = (i128::from(self.month) + 9) % 12;
        let of_year = (153 * march_month + 2) / 5 + i128::from(self.day) - 1;
        let (era, year_of_era) = (march_year.div_euclid(400), march_year.rem_euclid(400));
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA_DAYS + of_era - 719_468;
        let of_day = i128::from(self.hour) * 3600 + i128::from(self.minute) * 60 + i128::from(self.second);
        (days * DAY_SECONDS + of_day) * NANOSECONDS
    }

    /// 1 for Sunday to 7 for Saturday.
    pub(super) fn weekday(self) -> u8 {
        let days = self.to_nanoseconds().div_euclid(NANOSECONDS * DAY_SECONDS);
        // 1970-01-01 was a Thursday.
        u8::try_from((days + 4).rem_euclid(7) + 1).unwrap_or(1)
    }
}

fn days_in_month(year: u16, month: u8) -> u8 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i128) -> DateTime {
        DateTime::from_nanoseconds(seconds * NANOSECONDS)
    }

    #[test]
    fn known_moments_have_their_dates_and_weekdays() {
        let date = |t: DateTime| (t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday());
        assert_eq!(date(at(0)), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(date(at(951_782_399)), (2000, 2, 28, 23, 59, 59, 2));
        assert_eq!(date(at(951_782_400)), (2000, 2, 29, 0, 0, 0, 3));
        assert_eq!(date(at(4_107_542_400)), (2100, 3, 1, 0, 0, 0, 2));
        assert_eq!(date(at(-1)), (1969, 12, 31, 23, 59, 59, 4));
    }

    #[test]
    fn every_day_of_the_calendar_goes_there_and_back() {
        let mut seconds = FIRST_SECOND;
        while seconds <= LAST_SECOND {
            assert_eq!(at(seconds).to_nanoseconds(), seconds * NANOSECONDS);
            seconds += DAY_SECONDS + 1;
        }
        assert_eq!(at(LAST_SECOND).to_nanoseconds(), LAST_SECOND * NANOSECONDS);
        assert_eq!(DateTime::from_nanoseconds(i128::MAX).year, 9999);
        assert_eq!(DateTime::from_nanoseconds(i128::MIN).year, 0);
    }

    #[test]
    fn what_is_no_date_becomes_the_nearest_one() {
        assert_eq!(DateTime::clamped(2023, 2, 31, 99, 99, 99), DateTime::clamped(2023, 2, 28, 23, 59, 59));
        assert_eq!(DateTime::clamped(2024, 0, 0, 0, 0, 0), DateTime::clamped(2024, 1, 1, 0, 0, 0));
        assert_eq!(DateTime::clamped(u16::MAX, 255, 255, 0, 0, 0), DateTime::clamped(9999, 12, 31, 0, 0, 0));
    }
}
