package tiles

import "time"

// lateTimes is by how much an event may bear an earlier time than one before it in the log: what
// one transaction records has the time at which that began.
const lateTimes = time.Hour

// Older returns how many events, whole bundles from an index on and among the first size, are
// from before a time, if old says of a bundle whether all its events bear such times.
//
// An event is not later than those behind it. So bundles that are not old by their times are, if
// more of those right behind them are: the clock was ahead. Were it fewer, the clock may
// have been behind when those were recorded.
func Older(from, size int64, before time.Time, old func(bundle int64, before time.Time) (bool, error)) (int64, error) {
	bundle, end := from/width, size/width
	for bundle < end {
		is, err := old(bundle, before)
		if err != nil {
			return 0, err
		}
		next := bundle + 1
		if !is {
			if next, err = outvoted(bundle, end, before.Add(-lateTimes), old); err != nil {
				return 0, err
			}
		}
		if next == bundle {
			break
		}
		bundle = next
	}
	return bundle * width, nil
}

// outvoted returns the first bundle behind some from first on and more old ones right behind
// them; first: there are none. Where times are in order it asks for few bundles.
func outvoted(first, end int64, before time.Time, old func(bundle int64, before time.Time) (bool, error)) (int64, error) {
	for n := int64(1); first+2*n < end; n *= 2 {
		next, is := first+n, true
		for ; is && next <= first+2*n; next++ {
			var err error
			if is, err = old(next, before); err != nil {
				return 0, err
			}
		}
		if is {
			return next, nil
		}
	}
	return first, nil
}
